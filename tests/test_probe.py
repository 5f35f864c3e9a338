"""inspect_h5.py --probe: states whose AUROC is known, and scikit-learn by another path."""

import contextlib
import io
import json
import math
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, inspect
from scipy.optimize import minimize
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import (
    GridSearchCV,
    KFold,
    PredefinedSplit,
    StratifiedGroupKFold,
    cross_val_predict,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import inspect_h5

VISION = "vision_representation"
KINDS = ("vision_token_representation", "query_token_representation", "multimodal_representation")
QUERY = "query_token_representation/layer_3"
SHIFT = 1.5  # between the classes in QUERY, in standard deviations
CLOSED_FORM = 0.5 * (1 + math.erf(SHIFT / 2))  # Phi(d / sqrt(2)), both classes Gaussian
NUM_IMAGES, NUM_QUESTIONS = 100, 6
MEANS = ("mean answer log-probability", "least answer log-probability")


def write_run(directory, table, states, schema_version=2, max_new_tokens=20):
    """One part: a row of the table is a sample, `states` are matrices by data set."""
    directory.mkdir(parents=True, exist_ok=True)
    layers = sorted({int(name.rpartition("_")[2]) for name in states if "/" in name})
    with h5py.File(directory / "gemma3_12b_embeddings_part_001.h5", "w") as file:
        widths = {name: matrix.shape[1] for name, matrix in states.items()}
        hidden_size = next(width for name, width in widths.items() if "/" in name)
        file.attrs.update({"layers": layers, "hidden_size": hidden_size, "num_samples": len(table)})
        file.attrs.update({"vision_hidden_size": widths[VISION], "max_new_tokens": max_new_tokens})
        file.attrs.update({"schema_version": schema_version})
        for row, sample in enumerate(table.to_dict("records")):
            group = file.create_group(sample["question_id"])
            for name in ("image_id", "question", "answer", "ground_truth_answer"):
                group.create_dataset(name, data=sample[name], dtype=h5py.string_dtype())
            group.attrs.update({"question_id": sample["question_id"], "row": row})
            group.attrs.update({"answer_truncated": False, "num_prompt_tokens": 9})
            group.attrs.update({"num_answer_tokens": sample.get("num_answer_tokens", 2)})
            if schema_version == 2:
                sha = sample.get("image_sha256", f"hash of {sample['image_id']}")
                group.attrs["image_sha256"] = sha
            if schema_version == 2 and max_new_tokens:
                group["answer_logprobs"] = np.array(sample["logprobs"], np.float32)
                group.attrs["first_token_entropy"] = np.float32(sample["entropy"])
            for name, matrix in states.items():
                group[name] = matrix[row].astype(np.float32)


def make_table(labels, rng):
    """Samples in groups of NUM_QUESTIONS about an image, with all that a sample needs."""
    count = len(labels)
    table = pd.DataFrame({"question_id": [f"q{row:04d}" for row in range(count)]})
    table["image_id"] = [f"{row // NUM_QUESTIONS}.png" for row in range(count)]
    table["question"] = rng.choice(["what is this?", "how many are there?", "where is it?"], count)
    table["ground_truth_answer"] = "red"
    table["answer"] = np.where(labels, "It is blue.", "It is red.")
    table["entropy"] = rng.random(count)
    doubt = rng.exponential(1, (count, 3)) + np.outer(labels, [0, 2, 0])
    table["logprobs"] = list(-doubt)
    return table


def make_states(labels, rng, width=12):
    """The label is readable from QUERY with AUROC Phi(d / sqrt 2); VISION names the image."""
    count = len(labels)
    images = np.repeat(np.arange(count // NUM_QUESTIONS), NUM_QUESTIONS)
    codes = rng.standard_normal((count // NUM_QUESTIONS, 128))
    states = {VISION: codes[images]}
    for kind in KINDS:
        for layer in (0, 3):
            states[f"{kind}/layer_{layer}"] = rng.standard_normal((count, width))
    direction = rng.standard_normal(width)
    states[QUERY] += np.outer(labels, SHIFT * direction / np.linalg.norm(direction))
    return states


def make_labels(rng, num_images=NUM_IMAGES):
    """In some images nearly all answers are wrong, in others nearly none."""
    shares = rng.choice([0.1, 0.9], num_images)
    return rng.random(num_images * NUM_QUESTIONS) < np.repeat(shares, NUM_QUESTIONS)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A directory of parts, and the labels of their samples."""
    directory, rng = tmp_path_factory.mktemp("known"), np.random.default_rng(5)
    labels = make_labels(rng)
    write_run(directory, make_table(labels, rng), make_states(labels, rng))
    return directory, labels


@pytest.fixture(scope="module")
def facts(known):
    """What `--json` says of it, once for all tests."""
    return run_json(known[0], "--probe", "answer_is_wrong")


@pytest.fixture(autouse=True)
def one_shuffle(request, monkeypatch):
    """Where the control is not what is tested, once is enough."""
    if "shuffle" not in request.node.name:
        monkeypatch.setattr(inspect_h5, "NUM_SHUFFLES", 1)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """60 samples about 10 images, quickly probed."""
    monkeypatch.setattr(inspect_h5, "NUM_FOLDS", 3)
    rng = np.random.default_rng(3)
    labels = np.arange(60) % 3 == 0
    table = make_table(labels, rng)
    states = make_states(labels, rng, width=4)
    write_run(tmp_path / "tiny", table, states)
    return tmp_path / "tiny", table, states


def run_json(*args):
    """What a program reads, whatever pytest does with stdout meanwhile."""
    out, err = io.StringIO(), io.StringIO()
    out.reconfigure = lambda **_: None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert inspect_h5.main([*map(str, args), "--json"]) == 0
    assert err.getvalue() == ""
    return json.loads(out.getvalue(), parse_constant=pytest.fail)


def write_labels(path, table, values, column="label"):
    pd.DataFrame({"question_id": table["question_id"], column: values}).to_csv(path, index=False)
    return f"{path}:{column}"


# What the table says


def test_the_table_finds_the_layer_and_is_not_fooled_by_the_image(known, facts):
    directory, labels = known
    cell = facts["cells"][QUERY]
    assert abs(cell["mean"] - CLOSED_FORM) < cell["sd"]
    leak = facts["cells"][VISION]
    assert abs(leak["mean"] - 0.5) < leak["sd"]
    for name in facts["cells"].keys() - {QUERY, VISION}:
        assert abs(facts["cells"][name]["mean"] - 0.5) < 0.08
    # A random split has each image on both sides.
    _, matrix = inspect_h5.load_embeddings(directory, VISION)
    folds = KFold(5, shuffle=True, random_state=0)
    fooled = cross_val_score(
        LogisticRegression(max_iter=1000), matrix, labels, cv=folds, scoring="roc_auc"
    )
    assert fooled.mean() > 0.85


def test_every_cell_is_scikit_learns_own(known, facts, tmp_path, capsys):
    """Another path: exported matrices, float64, a pipeline in a grid search, folds made anew."""
    directory, labels = known
    assert inspect(capsys, directory, "--export", tmp_path / "all.npz")[0] == 0
    with np.load(tmp_path / "all.npz") as file:
        arrays = dict(file)
    texts = json.loads(arrays.pop("texts").tobytes())
    splitter = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    fold_of = np.empty(len(labels), int)
    for number, (_, test) in enumerate(splitter.split(labels, labels, texts["image_id"])):
        fold_of[test] = number
        ids = np.array(texts["question_id"])
        assert facts["folds"][number]["question_id"] == list(ids[test])
    assert set(facts["cells"]) == set(arrays)
    for name, cell in facts["cells"].items():
        matrix = arrays[name].astype(np.float64)
        grid = {"C": [s / matrix.shape[1] for s in (0.03, 0.3, 3, 30)]}
        for number in range(5):
            train, test = fold_of != number, fold_of == number
            pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
            if number == 0 or name == QUERY:  # for time's sake not always
                first, second = np.unique(fold_of[train])[:2]  # held out in turn
                inner = np.where(fold_of == first, 0, np.where(fold_of == second, 1, -1))[train]
                search = GridSearchCV(
                    pipeline[-1], grid, scoring="roc_auc", cv=PredefinedSplit(inner), refit=False
                )
                scaled = pipeline[0].fit_transform(matrix[train])
                means = search.fit(scaled, labels[train]).cv_results_["mean_test_score"]
                chosen = grid["C"].index(pytest.approx(cell["C"][number]))
                assert means[chosen] > means.max() - 2e-3  # a tie may go either way
            pipeline.set_params(logisticregression__C=cell["C"][number])
            scores = pipeline.fit(matrix[train], labels[train]).decision_function(matrix[test])
            assert cell["auroc"][number] == pytest.approx(
                roc_auc_score(labels[test], scores), abs=2e-3
            )
            known = roc_auc_score(labels[train], pipeline.decision_function(matrix[train]))
            assert cell["auroc_train"][number] == pytest.approx(known, abs=2e-3)
            if "f1" in cell and (number == 0 or name == QUERY):
                held_out = cross_val_predict(
                    pipeline,
                    matrix[train],
                    labels[train],
                    cv=PredefinedSplit(fold_of[train]),
                    method="decision_function",
                )
                expected = by_hand(labels[train], held_out, labels[test], scores)
                found = {name: cell[name][number] for name in expected}
                assert found == pytest.approx(expected, abs=0.02), name


def by_hand(known_labels, known_scores, labels, scores):
    """A paper's figures: every threshold tried, Platt's two numbers by another minimiser."""
    f1s = {t: metrics.f1_score(known_labels, known_scores >= t) for t in known_scores}
    told = scores >= max(f1s, key=f1s.get)

    def loss(x):
        return metrics.log_loss(known_labels, 1 / (1 + np.exp(-x[0] * known_scores - x[1])))

    slope, shift = minimize(loss, [1, 0], method="Nelder-Mead").x
    chances = 1 / (1 + np.exp(-slope * scores - shift))
    error = 0
    for k in range(10):
        inside = (chances >= k / 10) & (chances < (k + 1) / 10)
        if inside.any():
            gap = abs(labels[inside].mean() - chances[inside].mean())
            error += inside.mean() * gap
    return {
        "auprc": metrics.average_precision_score(labels, scores),
        "precision": metrics.precision_score(labels, told),
        "recall": metrics.recall_score(labels, told),
        "f1": metrics.f1_score(labels, told),
        "brier": metrics.brier_score_loss(labels, chances),
        "ece": error,
    }


def test_categories_have_their_own_auroc(known, tmp_path, capsys):
    """One that holds all samples has the cell's; one of one class has none; both are counted."""
    directory, labels = known
    table, _ = inspect_h5.load_embeddings(directory, VISION)
    flags = ["--probe", "answer_is_wrong", "--layer", 3, "--representation", KINDS[1], "--by"]
    all_one = write_labels(tmp_path / "one.csv", table, ["POPE"] * len(table), "benchmark")
    (cell,) = run_json(directory, *flags, all_one)["cells"].values()
    assert cell["by"] == {"POPE": pytest.approx(cell["mean"])}
    kinds = np.where(labels & (np.arange(len(labels)) % 2 == 0), "odd", "mixed").astype(object)
    kinds[:6] = ""
    by = write_labels(tmp_path / "by.csv", table, kinds, "benchmark")
    facts = run_json(directory, *flags, by)
    (cell,) = facts["cells"].values()
    assert cell["by"]["odd"] is None
    assert 0.7 < cell["by"]["mixed"] < 1
    assert facts["by"] == {
        name: [int((kinds == name).sum()), int(labels[kinds == name].sum())]
        for name in ("mixed", "odd")
    }
    out = inspect(capsys, directory, *flags, by)[1].splitlines()
    assert out[-1].split() == ["odd", *map(str, facts["by"]["odd"]), "-"]
    assert out[-2].split() == [
        "mixed",
        *map(str, facts["by"]["mixed"]),
        f"{cell['by']['mixed']:.2f}",
    ]


def test_no_image_is_in_two_folds_and_no_sample_is_missing(known, facts):
    table, _ = inspect_h5.load_embeddings(known[0], VISION)
    image = table.set_index("question_id")["image_id"]
    folds = [set(image[fold["question_id"]]) for fold in facts["folds"]]
    assert sum(map(len, folds)) == len(set.union(*folds)) == NUM_IMAGES
    assert sum(len(fold["question_id"]) for fold in facts["folds"]) == len(table)


def test_a_picture_of_two_names_is_one_image(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2 == 0
    table = make_table(labels, rng)
    sources = np.arange(60) // NUM_QUESTIONS % 5  # images 0 and 5 are one file, 1 and 6, ...
    table["image_sha256"] = [f"hash {source}" for source in sources]
    write_run(tmp_path, table, make_states(labels, rng, width=4))
    flags = ["--probe", "answer_is_wrong", "--representation", VISION]
    for fold in run_json(tmp_path, *flags)["folds"]:
        rows = [int(question_id[1:]) for question_id in fold["question_id"]]
        others = sorted(set(range(60)) - set(rows))
        assert not set(sources[rows]) & set(sources[others])


def test_the_shuffled_control_is_a_half(facts):
    assert facts["shuffled"]["of"] == QUERY
    assert len(facts["shuffled"]["auroc"]) == 25
    assert abs(facts["shuffled"]["mean"] - 0.5) < 0.03
    assert not facts["leaks"]


def test_the_text_shows_what_the_json_holds(known, facts, capsys, monkeypatch):
    monkeypatch.setattr(inspect_h5, "probe", lambda *_: facts)
    status, out, err = inspect(capsys, known[0], "--probe", "answer_is_wrong")
    assert (status, err) == (0, "")
    wrong = int(known[1].sum())
    assert f"{len(known[1]) - wrong} × right, {wrong} × wrong; 0 without a label" in out
    assert "does not stand" in out
    above, below = out.split("\nbest cells")
    lines = {line[:30].strip(): line[27:].split() for line in above.splitlines()}
    rows = {line.split()[0]: line.split()[1:] for line in above.splitlines() if line}
    assert rows["layer"] == [kind.removesuffix("_representation") for kind in KINDS]
    for layer in (0, 3):
        for kind, shown in zip(KINDS, rows[str(layer)], strict=True):
            cell = facts["cells"][f"{kind}/layer_{layer}"]
            assert shown == f"{cell['mean']:.2f}±{cell['sd']:.2f}"
    measured = {line[:28].strip(): line[28:].split() for line in below.splitlines()[2:]}
    columns = ("auroc", "auroc_train", "auprc", "precision", "recall", "f1", "brier", "ece")
    for name, cell in {"query_token 3": facts["cells"][QUERY], **facts["baselines"]}.items():
        assert measured[name] == [f"{np.mean(cell[column]):.2f}" for column in columns]
    assert f"AUPRC by chance {wrong / len(known[1]):.2f}, the share of 'wrong'" in below
    levels = {VISION: facts["cells"][VISION]} | facts["baselines"]
    levels["best probe, labels shuffled"] = facts["shuffled"]
    for name, cell in levels.items():
        assert lines[name][-1] == f"{cell['mean']:.2f}±{cell['sd']:.2f}"
    assert max(map(len, out.splitlines())) <= 80


# What it is compared with


def test_baselines_are_scikit_learns_own(known, facts):
    table, _ = inspect_h5.load_embeddings(known[0], VISION)
    place = pd.Series(range(len(table)), table["question_id"])
    numbers = {
        "first-token entropy": table["first_token_entropy"],
        "mean answer log-probability": table["answer_logprobs"].map(lambda x: sum(x) / len(x)),
        "least answer log-probability": table["answer_logprobs"].map(min),
        "answer length in tokens": table["num_answer_tokens"],
    }
    for name, values in numbers.items():
        for number, fold in enumerate(facts["folds"]):
            test = place[fold["question_id"]].to_numpy()
            train = np.setdiff1d(place, test)
            auroc = roc_auc_score(known[1][test], values[test])
            if roc_auc_score(known[1][train], values[train]) < 0.5:
                auroc = 1 - auroc
            assert facts["baselines"][name]["auroc"][number] == pytest.approx(auroc, abs=1e-6)
    assert all(facts["baselines"][name]["mean"] > 0.7 for name in MEANS)  # wrong: less likely
    assert facts["baselines"]["answer length in tokens"]["mean"] == 0.5  # all have as many
    assert abs(facts["baselines"]["question text alone"]["mean"] - 0.5) < 0.1


# Controls


def test_shuffled_labels_notice_a_planted_leak(tmp_path, capsys, monkeypatch):
    """Folds that know nothing of images, where the label goes by the image."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(60) % 2 == 0, NUM_QUESTIONS)
    write_run(tmp_path, make_table(labels, rng), make_states(labels, rng, width=4))
    flags = [tmp_path, "--probe", "answer_is_wrong", "--representation", VISION]
    status, out, _ = inspect(capsys, *flags)
    assert status == 0
    assert "leaks" not in out

    def split_at_random(labels, images):
        return np.array_split(np.random.default_rng(0).permutation(len(labels)), 5)

    monkeypatch.setattr(inspect_h5, "split_by_image", split_at_random)
    status, out, _ = inspect(capsys, *flags)
    assert status == 0
    assert "something leaks" in out


# Labels

PAIRS = pd.read_csv(ROOT / "tests/data/answer_pairs.csv", dtype=str, keep_default_na=False)


def label(truths, answers):
    table = pd.DataFrame({"ground_truth_answer": truths, "answer": answers})
    labels, notes = inspect_h5.label_answers(table)
    return ["" if math.isnan(wrong) else str(int(wrong)) for wrong in labels], notes


@pytest.mark.parametrize("source", PAIRS["source"].unique())
def test_the_rule_of_answer_is_wrong(source):
    """Pairs as they stand in public data sets, each with the label that a reader gives it."""
    pairs = PAIRS[PAIRS["source"] == source]
    for truth, answer, wrong in zip(pairs["ground_truth"], pairs["answer"], pairs["wrong"]):
        assert label([truth, "x"], [answer, "x"])[0] == [wrong, "0"], (truth, answer)


def test_one_and_zero_are_yes_and_no_where_answers_are():
    """HallusionBench: truths 1 and 0, answers that begin with yes or no; but not counts."""
    answers = ["Yes, it is.", "No.", "no", "Yes"]
    labels, notes = label(["1", "1", "0", "0.0"], answers)
    assert labels == ["0", "1", "0", "1"]
    assert notes == ["ground truths are 0 and 1: read as yes and no"]
    assert label(["1", "0", "1", "0"], ["1 dog", "there are 2", "none", "0"]) == (list("0110"), [])
    assert label(["1", "0", "2", "0"], answers) == (list("1111"), [])


def test_the_notes_count_what_the_rule_does_not_see():
    truths = ["a; b", "['a', 'b']", "a", "狗", "แมว; ねこ"]
    labels, notes = label(truths, ["(B)", "b", "c", "狗", "x"])
    assert labels == ["0", "0", "1", "", ""]
    assert [note.split()[0] for note in notes] == ["3", "2"]
    assert "several answers" in notes[0]
    assert "bring your own labels" in notes[1]


def test_the_rule_is_applied_and_printed(tiny, capsys):
    directory, table, states = tiny
    table["ground_truth_answer"] = ["red", "blue", "?!"] * 20
    table["answer"] = ["red"] * 60
    write_run(directory, table, states)
    status, out, _ = inspect(capsys, directory, "--probe", "answer_is_wrong", "--layer", 3)
    assert status == 0
    assert "20 × right, 20 × wrong; 20 without a label" in out
    assert " ".join(inspect_h5.RULE.split()) in " ".join(out.split())


LABELS = {
    "two texts": (["Yes", "no", "", "no"], [], {"no": 30, "Yes": 15}, 15),
    "two numbers": (["9", "10", "9", "9"], [], {"9": 45, "10": 15}, 0),
    "None is a value": (["None", "NA", " NA ", "None"], [], {"NA": 30, "None": 30}, 0),
    "above": (["0.2", "7e-1", "0.5", ""], ["--above", "0.5"], {"≤ 0.5": 30, "> 0.5": 15}, 15),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_of_a_csv(tiny, tmp_path, case):
    values, flags, classes, without = LABELS[case]
    label = write_labels(tmp_path / "labels.csv", tiny[1], values * 15, "why not")
    facts = run_json(tiny[0], "--probe", label, *flags, "--representation", VISION)
    assert facts["classes"] == classes
    assert list(facts["classes"]) == list(classes)
    assert facts["num_without_label"] == without
    assert sum(len(fold["question_id"]) for fold in facts["folds"]) == 60 - without


# Its flags


def test_a_representation_or_a_layer_alone(tiny):
    flags = [tiny[0], "--probe", "answer_is_wrong"]
    assert list(run_json(*flags, "--layer", 3)["cells"]) == [f"{kind}/layer_3" for kind in KINDS]
    assert list(run_json(*flags, "--representation", VISION)["cells"]) == [VISION]


def test_the_perceptron(known, capsys):
    """HALP's, on the layer that tells and on one that does not."""
    args = (known[0], "--probe", "answer_is_wrong", "--probe-model", "mlp", "--json")
    status, out, _ = inspect(capsys, *args, "--representation", KINDS[1])
    facts = json.loads(out)
    assert status == 0
    assert "512-256-128" in facts["probe"]
    assert facts["cells"][QUERY]["mean"] == pytest.approx(CLOSED_FORM, abs=0.05)
    assert facts["cells"][f"{KINDS[1]}/layer_0"]["mean"] == pytest.approx(0.5, abs=0.08)
    assert not facts["leaks"]


def test_probe_and_plot_write_the_table_and_the_picture(tiny, tmp_path, capsys):
    args = (tiny[0], "--probe", "answer_is_wrong", "--layer", 3, "--plot", tmp_path / "x.png")
    status, out, err = inspect(capsys, *args)
    assert (status, err) == (0, "")
    assert "AUROC" in out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# What is refused


def one_line(capsys, *args):
    status, out, err = inspect(capsys, *args)
    assert (status, out, len(err.splitlines())) == (1, "", 1), (status, out, err)
    return err


def alter(tiny, **columns):
    directory, table, states = tiny
    write_run(directory, table.assign(**columns), states)


REFUSED = {
    "a column": ("labels.csv:other", {}, "no column other; it has ['question_id', 'label']"),
    "a file": ("none.csv:label", {}, "none.csv cannot be read"),
    "no id matches": ("others.csv:label", {}, "60 of 60 samples are not in others.csv, first ["),
    "leading zeros": ("others.csv:label", {}, "['q0000'] (it has ['0']); did leading zeros"),
    "no value": ("empty.csv:label", {}, "empty.csv:label: no sample has a value there"),
    "semicolons": ("semicolons.csv:label", {}, "separated by semicolons or tabs: save it with"),
    "trailing commas": ("commas.csv:label", {}, "60 rows have more or fewer fields than the h"),
    "no question_id": ("no_id.csv:label", {}, "no column question_id; it has ['id', 'label']"),
    "a column twice": ("columns.csv:label", {}, "several columns label; it has ['question_id',"),
    "an id twice": ("twice.csv:label", {}, "twice.csv: question_id 'q0007' is there twice"),
    "many texts": ("texts.csv:label", {}, "3 values instead of two, first ['a', 'b', 'c']"),
    "many numbers": ("numbers.csv:label", {}, "--above X"),
    "one class": (
        "answer_is_wrong",
        {"answer": "blue"},
        "too few for a probe: 0 and 60 samples of the classes",
    ),
    "one image": (
        "labels.csv:label",
        {"image_id": "a", "image_sha256": "x"},
        "30 and 30 samples of the classes, about 1 and 1 images",
    ),
    "two images": (
        "labels.csv:label",
        {"image_id": ["a", "b"] * 30, "image_sha256": ["x", "y"] * 30},
        "30 and 30 samples of the classes, about 1 and 1 images",
    ),
    "few of a class": ("rare.csv:label", {}, "too few for a probe"),
    "no ground truth": (
        "answer_is_wrong",
        {"ground_truth_answer": ""},
        "too few for a probe: 0 and 0 samples",
    ),
    "no answers": ("answer_is_wrong", {"answer": ""}, "no answers are stored"),
    "an entropy": (
        "labels.csv:label",
        {"entropy": [np.nan] + [1.0] * 59},
        "first-token entropy: not finite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_probed_is_one_line(tiny, tmp_path, capsys, monkeypatch, case):
    label, columns, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    table = tiny[1]
    write_labels("labels.csv", table, ["0", "1"] * 30)
    write_labels("texts.csv", table, ["a", "b", "c"] * 20)
    write_labels("numbers.csv", table, ["1", "2", "3"] * 20)
    write_labels("rare.csv", table, ["1"] * 8 + ["0"] * 52)  # of two images
    write_labels("others.csv", table.assign(question_id=range(60)), ["0", "1"] * 30)
    write_labels("empty.csv", table, [""] * 60)
    lines = Path("labels.csv").read_text().splitlines()
    Path("semicolons.csv").write_text("\n".join(lines).replace(",", ";"))
    Path("commas.csv").write_text("\n".join([lines[0], *(line + "," for line in lines[1:])]))
    Path("no_id.csv").write_text("\n".join(["id,label", *lines[1:]]))
    Path("columns.csv").write_text("\n".join(f"{line},{line[6:]}" for line in lines))
    Path("twice.csv").write_text("\n".join([*lines, lines[8]]))
    if columns:
        alter(tiny, **columns)
    assert message in one_line(capsys, tiny[0], "--probe", label)


@pytest.mark.parametrize("value", ["90%", "0,9", "n/a"])
def test_a_value_that_is_no_number_is_told(tiny, tmp_path, capsys, value):
    label = write_labels(tmp_path / "labels.csv", tiny[1], ["0.1", value, "0.9"] * 20)
    err = one_line(capsys, tiny[0], "--probe", label, "--above", "0.5")
    assert f"20 values are no numbers, as {value!r}; write 0.9, not 90% or 0,9" in err


def test_ids_that_match_in_part_are_counted(tiny, tmp_path):
    label = write_labels(tmp_path / "labels.csv", tiny[1][6:], ["0", "1"] * 27)
    facts = run_json(tiny[0], "--probe", label, "--representation", VISION)
    (note,) = facts["notes"]
    assert note.startswith("6 of 60 samples are not in ")
    assert "first ['q0000'] (it has ['q0006']); did leading zeros get lost?" in note
    assert facts["num_without_label"] == 6


def test_values_that_are_not_finite_are_one_line(tiny, capsys):
    directory, table, states = tiny
    states[QUERY][7, 2] = np.inf
    write_run(directory, table, states)
    args = (directory, "--probe", "answer_is_wrong", "--representation", KINDS[1], "--layer", 3)
    err = one_line(capsys, *args)
    assert f"{QUERY}: not finite" in err


def test_without_scikit_learn_it_says_what_to_install(tiny, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "pip install scikit-learn" in one_line(capsys, tiny[0], "--probe", "answer_is_wrong")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--probe", "label"], "CSV:COLUMN"),
        (["--probe", "answer_is_wrong", "--above", "1"], "--above"),
        (["--probe", "answer_is_wrong", "--verify"], "does not go with"),
        (["--probe", "answer_is_wrong", "--export", "x.npz"], "does not go with"),
        (["--probe", "answer_is_wrong", "--plot", "x.gif"], ".png"),
        (["--probe", "answer_is_wrong", "--plot", "x.png", "--color-by", "answer"], "--color-by"),
        (["--probe", "answer_is_wrong", "--max-samples", "9"], "--max-samples"),
        (["--probe", "answer_is_wrong", "--probe-model", "tree"], "tree"),
        (["--probe-model", "mlp"], "--probe-model does not go with view"),
        (["--above", "1"], "--above does not go with view"),
    ],
)
def test_wrong_usage_is_status_2(tiny, capsys, flags, message):
    status, out, err = inspect(capsys, tiny[0], *flags)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
