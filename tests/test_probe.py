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
import sklearn
from conftest import ROOT, find_blocks, inspect
from scipy.optimize import minimize
from sklearn import metrics
from sklearn.feature_extraction.text import TfidfVectorizer
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
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import inspect_h5

VISION = "vision_representation"
KINDS = ("vision_token_representation", "query_token_representation", "multimodal_representation")
QUERY = "query_token_representation/layer_3"
SHIFT = 1.5  # between the classes in QUERY, in standard deviations
CLOSED_FORM = 0.5 * (1 + math.erf(SHIFT / 2))  # Phi(d / sqrt(2)), both classes Gaussian
NUM_IMAGES, NUM_QUESTIONS = 100, 6
MEANS = ("mean log-probability", "least log-probability")


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
def saved(known, tmp_path_factory):
    """Where `--save` wrote its table."""
    return tmp_path_factory.mktemp("saved") / "probabilities.csv"


@pytest.fixture(scope="module")
def facts(known, saved):
    """What `--json` says of it, once for all tests."""
    return run_json(known[0], "--probe", "answer_is_wrong", "--save", saved)


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
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert inspect_h5.main([*map(str, args), "--json"]) == 0
    assert err.getvalue() == ""
    return json.loads(out.getvalue(), parse_constant=pytest.fail)


def write_labels(path, table, values, column="label"):
    pd.DataFrame({"question_id": table["question_id"], column: values}).to_csv(path, index=False)
    return f"{path}:{column}"


def make_task(labels, groups=None, num_folds=5, model="linear", seed=0):
    """A task whose folds are dealt in turn, each sample a group of its own unless groups say."""
    groups = np.arange(len(labels)) if groups is None else groups
    fold_of = np.unique(groups, return_inverse=True)[1] % num_folds
    return inspect_h5.Task(np.asarray(labels, bool), groups.astype(str), fold_of, model, seed)


def score_cell(task, scores):
    """A cell that gives every sample this score in each fold."""
    aurocs = [roc_auc_score(task.labels[fold], scores[fold]) for fold in task.folds()]
    return [inspect_h5.Outcome("x", 1, 0, auroc, 0, scores) for auroc in aurocs]


def mean_auroc(cell):
    return np.mean([outcome.auroc for outcome in cell])


# What the first table says


def test_the_table_finds_the_layer_and_is_not_fooled_by_the_image(known, facts):
    directory, labels = known
    aurocs = {name: cell["auroc"] for name, cell in facts["cells"].items()}
    for name, expected in {QUERY: CLOSED_FORM, VISION: 0.5}.items():
        assert abs(np.mean(aurocs[name]) - expected) < np.std(aurocs[name])
    for name in aurocs.keys() - {QUERY, VISION}:
        assert abs(np.mean(aurocs[name]) - 0.5) < 0.08
    # A random split has each image on both sides.
    _, matrix = inspect_h5.load_embeddings(directory, VISION)
    folds = KFold(5, shuffle=True, random_state=0)
    fooled = cross_val_score(
        LogisticRegression(max_iter=1000), matrix, labels, cv=folds, scoring="roc_auc"
    )
    assert fooled.mean() > 0.85


@pytest.fixture(scope="module")
def exported(known, tmp_path_factory):
    """Every matrix in float64 from the .npz, and the fold of each sample made anew."""
    path = tmp_path_factory.mktemp("exported") / "all.npz"
    with contextlib.redirect_stdout(io.StringIO()):
        assert inspect_h5.main([str(known[0]), "--export", str(path)]) == 0
    with np.load(path) as file:
        arrays = dict(file)
    splitter = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    fold_of = np.empty(len(known[1]), int)
    for number, (_, test) in enumerate(splitter.split(known[1], known[1], arrays["image_id"])):
        fold_of[test] = number
    matrices = {name: arrays[name].astype(float) for name in arrays if "representation" in name}
    return matrices, fold_of, arrays["question_id"]


def make_pipeline_of(matrix, strength):
    probe = LogisticRegression(C=strength / matrix.shape[1], max_iter=5000)
    return make_pipeline(StandardScaler(), probe)


def search_inner_folds(matrix, labels, fold_of, number):
    """Mean AUROC of the inner folds for each penalty, by scikit-learn's own grid search."""
    train = fold_of != number
    pipeline = make_pipeline_of(matrix, 1)
    grid = {"logisticregression__C": [s / matrix.shape[1] for s in inspect_h5.STRENGTHS]}
    folds = PredefinedSplit(fold_of[train])
    search = GridSearchCV(pipeline, grid, scoring="roc_auc", cv=folds, refit=False)
    return search.fit(matrix[train], labels[train]).cv_results_["mean_test_score"]


def score_outer_fold(matrix, labels, fold_of, number, strength):
    """Scores of all samples by a probe of all other folds."""
    train = fold_of != number
    pipeline = make_pipeline_of(matrix, strength * matrix.shape[1])
    return pipeline.fit(matrix[train], labels[train]).decision_function(matrix)


def test_every_cell_is_scikit_learns_own(known, facts, exported):
    """Another path: exported matrices, float64, a pipeline in a grid search, folds made anew."""
    labels = known[1]
    matrices, fold_of, question_ids = exported
    assert set(facts["cells"]) == set(matrices)
    for number, fold in enumerate(facts["folds"]):
        assert fold["question_id"] == list(question_ids[fold_of == number])
    for name, cell in facts["cells"].items():
        for number in range(5) if name == QUERY else [0]:  # for time's sake not always
            matrix = matrices[name]
            means = search_inner_folds(matrix, labels, fold_of, number)
            grid = [strength / matrix.shape[1] for strength in inspect_h5.STRENGTHS]
            chosen = grid.index(pytest.approx(cell["C"][number]))
            assert means[chosen] > means.max() - 2e-3  # a tie may go either way
            scores = score_outer_fold(matrix, labels, fold_of, number, cell["C"][number])
            test = fold_of == number
            auroc = roc_auc_score(labels[test], scores[test])
            assert cell["auroc"][number] == pytest.approx(auroc, abs=2e-3)
            auroc = roc_auc_score(labels[~test], scores[~test])
            assert cell["auroc_train"][number] == pytest.approx(auroc, abs=2e-3)


# What the report says


def by_hand(known_labels, known_scores, scores):
    """Platt's two numbers by another minimiser, every threshold tried: probabilities, threshold."""
    size = known_scores.std()

    def loss(x):
        return metrics.log_loss(known_labels, 1 / (1 + np.exp(-x[0] * known_scores / size - x[1])))

    slope, shift = minimize(loss, [1, 0], method="Nelder-Mead").x
    known = 1 / (1 + np.exp(-slope * known_scores / size - shift))
    f1s = {t: metrics.f1_score(known_labels, known >= t) for t in known}
    return 1 / (1 + np.exp(-slope * scores / size - shift)), max(f1s, key=f1s.get)


def ten_bins(labels, probabilities):
    error = 0
    for k in range(10):
        inside = (probabilities >= k / 10) & (probabilities < (k + 1) / 10)
        if inside.any():
            gap = abs(labels[inside].mean() - probabilities[inside].mean())
            error += inside.mean() * gap
    return error


def test_the_report_is_computed_by_another_path(known, facts, exported, saved):
    """Layer, penalty, probabilities and every figure, from exported matrices."""
    labels = known[1]
    matrices, fold_of, _ = exported
    names = [f"{KINDS[1]}/layer_{layer}" for layer in (0, 3)]
    found = facts["report"]["query_token"]
    probabilities = np.empty(len(labels))
    told = np.empty(len(labels), bool)
    aurocs, trained, auprcs, thresholds = [], [], [], []
    for number in range(5):
        test = fold_of == number
        inner = {n: search_inner_folds(matrices[n], labels, fold_of, number).max() for n in names}
        chosen = max(inner, key=inner.get)
        assert found["layers"][number] == int(chosen[-1])
        strength = facts["cells"][chosen]["C"][number]
        scores = score_outer_fold(matrices[chosen], labels, fold_of, number, strength)
        aurocs.append(roc_auc_score(labels[test], scores[test]))
        trained.append(roc_auc_score(labels[~test], scores[~test]))
        auprcs.append(metrics.average_precision_score(labels[test], scores[test]))
        matrix = matrices[chosen]
        held_out = cross_val_predict(
            make_pipeline_of(matrix, strength * matrix.shape[1]),
            matrix[~test],
            labels[~test],
            cv=PredefinedSplit(fold_of[~test]),
            method="decision_function",
        )
        probabilities[test], threshold = by_hand(labels[~test], held_out, scores[test])
        told[test] = probabilities[test] >= threshold
        thresholds.append(threshold)
    expected = {"auroc": aurocs, "auroc_train": trained, "auprc": auprcs}
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.mean(values), abs=2e-3), name
    assert found["brier"] == pytest.approx(np.mean((labels - probabilities) ** 2), abs=2e-3)
    assert found["ece"] == pytest.approx(ten_bins(labels, probabilities), abs=0.01)
    assert found["threshold"] == pytest.approx(np.mean(thresholds), abs=0.02)
    for score in (metrics.precision_score, metrics.recall_score, metrics.f1_score):
        name = score.__name__.removesuffix("_score")
        assert found[name] == pytest.approx(score(labels, told), abs=0.02), name
    np.testing.assert_allclose(pd.read_csv(saved)["query_token"], probabilities, atol=0.01)


def test_the_interval_is_that_of_a_plain_loop(known, facts, saved):
    """Groups drawn anew by another generator; within the rounding of 200 draws."""
    table = pd.read_csv(saved)
    rng = np.random.default_rng(1)
    labels = (table["label"] == "wrong").to_numpy()
    drawn = {name: [] for name in ("query_token", "question text alone")}
    for _ in range(200):
        aurocs = {name: [] for name in drawn}
        for _, fold in table.groupby("fold"):
            places = fold.groupby("image_id").indices
            images = rng.choice(list(places), len(places))
            rows = fold.index[np.concatenate([places[image] for image in images])]
            for name, found in aurocs.items():
                found.append(roc_auc_score(labels[rows], table.loc[rows, name]))
        for name, found in aurocs.items():
            drawn[name].append(np.mean(found))
    for name, aurocs in drawn.items():
        low, high = np.percentile(aurocs, [2.5, 97.5])
        figures = facts["report"][name]
        assert [figures["auroc_low"], figures["auroc_high"]] == pytest.approx(
            [low, high], abs=0.015
        )
    above = np.subtract(drawn["query_token"], drawn["question text alone"])
    found = facts["differences"]["question text alone"]
    assert [found["low"], found["high"]] == pytest.approx(
        np.percentile(above, [2.5, 97.5]), abs=0.02
    )
    auroc = [facts["report"][name]["auroc"] for name in drawn]
    assert found["auroc"] == pytest.approx(auroc[0] - auroc[1])
    assert facts["best"] == "query_token"


def test_weighted_aurocs_are_those_of_repeated_samples():
    """The bootstrap's arithmetic, ties and all, against scikit-learn on samples repeated."""
    rng = np.random.default_rng(0)
    labels = rng.random(60) < 0.3
    scores = rng.integers(0, 12, 60) + labels
    weights = rng.multinomial(60, np.full(60, 1 / 60), 20)
    found = inspect_h5.weighted_aurocs(labels, scores, weights)
    for auroc, counts in zip(found, weights):
        expected = roc_auc_score(np.repeat(labels, counts), np.repeat(scores, counts))
        assert auroc == pytest.approx(expected)


@pytest.mark.parametrize(("size", "positive"), [(8, 2), (20, 5), (200, 8), (5, 1), (6, 6)])
def test_chance_is_what_shuffling_gives(size, positive):
    """Average precision of 10,000 random orders: the mean share of positives up to each of them."""
    rng = np.random.default_rng(0)
    labels = np.arange(size) < positive
    orders = rng.permuted(np.tile(labels, (10_000, 1)), axis=1)
    precision = orders.cumsum(axis=1) / np.arange(1, size + 1)
    shuffled = (precision * orders).sum(axis=1) / positive
    expected = inspect_h5.expected_average_precision(size, positive)
    assert expected == pytest.approx(shuffled.mean(), abs=4 * shuffled.std() / 100 + 1e-9)


def test_chance_of_small_folds_is_above_the_share():
    """What the table said before, 0.25 and 0.04, is 0.35 and 0.07 in folds of 20 and 200."""
    for num_samples, share, expected in ((100, 0.25, 0.35), (1000, 0.04, 0.07)):
        labels = np.arange(num_samples) // 5 < share * num_samples / 5
        chance = inspect_h5.measure_chance(make_task(labels))
        assert chance["auprc"] == pytest.approx(expected, abs=0.03)
        assert chance["brier"] == pytest.approx(share * (1 - share))
        assert chance["f1"] == pytest.approx(metrics.f1_score(labels, labels | True))
        assert (chance["auroc"], chance["ece"], chance["recall"]) == (0.5, 0, 1)


def test_noise_is_a_half_in_the_report_and_in_the_control(monkeypatch):
    """The best of the cells by themselves is well above it."""
    monkeypatch.setattr(inspect_h5, "STRENGTHS", (0.03, 3))
    reported, control, best = [], [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        labels = rng.random(200) < 0.3
        task = make_task(labels, seed=seed)
        shuffled = inspect_h5.shuffle_labels(task)
        assert shuffled.labels.sum() == labels.sum()
        matrices = {f"layer {k}": rng.standard_normal((200, 4), np.float32) for k in range(6)}
        for one, found in ((task, reported), (shuffled, control)):
            cells = {name: inspect_h5.try_cell(one, name, matrices[name]) for name in matrices}
            found.append(mean_auroc(inspect_h5.choose_cell(cells.values())))
            if one is task:
                aurocs = [mean_auroc(cell) for cell in cells.values()]
                best.append(max(aurocs))
    assert np.mean(reported) == pytest.approx(0.5, abs=0.05)
    assert np.mean(control) == pytest.approx(0.5, abs=0.05)
    assert np.mean(best) > 0.53


@pytest.mark.parametrize(("size", "expected"), [(200, 0.048), (500, 0.036), (2000, 0.021)])
def test_a_calibrated_score_has_the_error_of_all_samples_together(size, expected):
    """The mean of folds would be 0.13, 0.08 and 0.045."""
    errors = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        chances = rng.uniform(0.02, 0.98, size)
        task = make_task(rng.random(size) < chances)
        cell = score_cell(task, np.log(chances / (1 - chances)))
        row = inspect_h5.measure(task, cell, inspect_h5.draw_weights(task))
        assert row.figures["ece"] == pytest.approx(ten_bins(task.labels, row.probabilities))
        errors.append(row.figures["ece"])
    assert np.mean(errors) == pytest.approx(expected, abs=0.015)


def test_a_rare_class_and_a_useless_probe_have_the_brier_score_of_chance():
    rng = np.random.default_rng(0)
    task = make_task(np.arange(1000) < 10)
    row = inspect_h5.measure(
        task, score_cell(task, rng.random(1000)), inspect_h5.draw_weights(task)
    )
    chance = inspect_h5.measure_chance(task)
    assert chance["brier"] == pytest.approx(0.0099, abs=1e-4)
    assert row.figures["brier"] == pytest.approx(chance["brier"], abs=5e-4)


def test_the_perceptron_learns_a_rare_class():
    """3 % positive: within 0.05 of the network trained by hand for as many epochs."""
    rng = np.random.default_rng(0)
    labels = rng.random(1500) < 0.03
    matrix = (rng.standard_normal((1500, 24)) + 0.35 * labels[:, None]).astype(np.float32)
    task = make_task(labels, num_folds=3, model="mlp")
    scores, _ = inspect_h5.fit_and_score(task, matrix, (0,), [1.0])
    test = task.fold_of == 0
    found = roc_auc_score(labels[test], scores[0, test])
    scaler = StandardScaler().fit(matrix[~test])
    network = MLPClassifier((512, 256, 128), random_state=1)
    for _ in range(inspect_h5.NUM_EPOCHS):
        network.partial_fit(scaler.transform(matrix[~test]), labels[~test], classes=[False, True])
    expected = roc_auc_score(labels[test], network.predict_proba(scaler.transform(matrix))[test, 1])
    assert found == pytest.approx(expected, abs=0.05)
    assert found > 0.75


def test_the_perceptron(tiny, capsys):
    """HALP's, through the command line, where a fold has 20 samples."""
    args = (tiny[0], "--probe", "answer_is_wrong", "--probe-model", "mlp", "--json")
    status, out, _ = inspect(capsys, *args, "--representation", KINDS[1], "--layer", 3)
    facts = json.loads(out)
    assert status == 0
    assert "512-256-128" in facts["probe"]
    assert facts["report"]["query_token"]["auroc"] > 0.6


def test_the_perceptron_takes_a_dozen_samples(tiny, tmp_path):
    few = [str(row // 6 % 2) if row % 3 == 0 else "" for row in range(36)]
    label = write_labels(tmp_path / "few.csv", tiny[1], few + [""] * 24)
    flags = ["--probe-model", "mlp", "--representation", VISION]
    facts = run_json(tiny[0], "--probe", label, *flags)
    assert facts["classes"] == {"0": 6, "1": 6}


def test_questions_in_chinese_are_read_as_those_in_english():
    """What the words say is said in either language; a clause without spaces is no one token."""
    rng = np.random.default_rng(0)
    animals = rng.integers(0, 4, 400)
    labels = rng.random(400) < np.array([0.15, 0.3, 0.6, 0.85])[animals]
    expected = roc_auc_score(labels, animals)
    task = make_task(labels)
    languages = (
        (
            "what is the colour of the {} near the {}?",
            ["cat", "dog", "horse", "bird"],
            "car",
            "tree",
        ),
        ("{}旁边的{}是什么颜色的？", ["猫", "狗", "马", "鸟"], "汽车", "树"),
        ("{}の近くの{}は何色ですか？", ["猫", "犬", "馬", "鳥"], "車", "木"),
    )
    for text, names, *places in languages:
        words = [(names[animal], places[rng.integers(2)]) for animal in animals]
        questions = np.array([text.format(*pair) for pair in words])
        cell = inspect_h5.try_cell(task, "text", questions)
        assert mean_auroc(cell) == pytest.approx(expected, abs=0.05)


def test_the_same_scene_in_two_files_needs_a_group(tmp_path):
    """States name the scene, labels go by scene, and each scene was photographed twice."""
    rng = np.random.default_rng(2)
    scenes = np.arange(480) // NUM_QUESTIONS % 40  # image k shows scene k % 40
    labels = (rng.random(40) < 0.5)[scenes]
    table = make_table(labels, rng)
    states = make_states(labels, rng, width=4)
    states[VISION] = rng.standard_normal((40, 64))[scenes] + 0.1 * rng.standard_normal((480, 64))
    write_run(tmp_path / "run", table, states)
    flags = [tmp_path / "run", "--probe", "answer_is_wrong", "--representation", VISION]
    by_image = run_json(*flags)
    assert by_image["report"]["vision"]["auroc"] > 0.7
    group = write_labels(tmp_path / "scenes.csv", table, scenes, "scene")
    by_scene = run_json(*flags, "--group", group)
    assert by_scene["report"]["vision"]["auroc"] == pytest.approx(0.5, abs=0.15)
    assert (by_image["num_groups"], by_scene["num_groups"]) == (80, 40)
    assert by_scene["group"] == group
    for fold in by_scene["folds"]:
        rows = [int(question_id[1:]) for question_id in fold["question_id"]]
        others = sorted(set(range(480)) - set(rows))
        assert not set(scenes[rows]) & set(scenes[others])


def test_categories_have_their_own_auroc(known, tmp_path):
    """One that holds all samples has the row's; a rare one has none; both are counted."""
    directory, labels = known
    table, _ = inspect_h5.load_embeddings(directory, VISION)
    flags = ["--probe", "answer_is_wrong", "--layer", 3, "--representation", KINDS[1], "--by"]
    all_one = write_labels(tmp_path / "one.csv", table, ["POPE"] * len(table), "benchmark")
    facts = run_json(directory, *flags, all_one)
    auroc = facts["report"]["query_token"]["auroc"]
    assert facts["by"]["POPE"]["auroc"] == {"query_token": pytest.approx(auroc)}
    assert facts["report"]["category alone"]["auroc"] == pytest.approx(0.5, abs=1e-6)
    kinds = np.where(labels & (np.arange(len(labels)) % 2 == 0), "odd", "mixed").astype(object)
    kinds[:6] = ""
    kinds[np.flatnonzero(~labels)[7:16]] = "odd"  # nine are too few
    by = write_labels(tmp_path / "by.csv", table, kinds, "benchmark")
    facts = run_json(directory, *flags, by)
    assert facts["by"]["odd"]["auroc"] == {"query_token": None}
    assert 0.7 < facts["by"]["mixed"]["auroc"]["query_token"] < 1
    assert facts["report"]["category alone"]["auroc"] > 0.7
    for name in ("mixed", "odd"):
        counts = [facts["by"][name][key] for key in ("num_samples", "num_positive")]
        assert counts == [(kinds == name).sum(), labels[kinds == name].sum()]
    out = "\n".join(inspect_h5.show_probe(facts)).splitlines()
    of_odd = facts["by"]["odd"]
    assert out[-1].split() == ["odd", str(of_odd["num_samples"]), str(of_odd["num_positive"]), "-"]
    assert out[-2].split()[-1] == f"{facts['by']['mixed']['auroc']['query_token']:.2f}"


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


COLUMNS = ("auroc_train", "auprc", "precision", "recall", "f1", "threshold", "brier", "ece")


def test_the_text_shows_what_the_json_holds(known, facts, capsys, monkeypatch):
    monkeypatch.setattr(inspect_h5, "probe", lambda *_: (facts, None))
    status, out, err = inspect(capsys, known[0], "--probe", "answer_is_wrong")
    assert (status, err) == (0, "")
    wrong = int(known[1].sum())
    assert f"{len(known[1]) - wrong} × right, {wrong} × wrong; 0 without a label" in out
    assert "positive is 'wrong'" in out
    assert out.count("wrong     red → It is blue.") == 3
    above, below = out.split("\nreport")
    rows = {line.split()[0]: line.split()[1:] for line in above.splitlines() if line}
    assert rows["layer"] == [kind.removesuffix("_representation") for kind in KINDS]
    for layer in (0, 3):
        for kind, shown in zip(KINDS, rows[str(layer)], strict=True):
            cell = facts["cells"][f"{kind}/layer_{layer}"]
            assert shown == f"{np.mean(cell['auroc']):.2f}±{np.std(cell['auroc'], ddof=1):.2f}"
    lines = {line[:21].strip(): line[21:].split() for line in reversed(below.splitlines())}
    for name, row in facts["report"].items():
        bounds = f"{row['auroc_low']:.2f}-{row['auroc_high']:.2f}" if name != "chance" else None
        shown = [f"{row[key]:.2f}" if key in row else "-" for key in COLUMNS]
        assert lines[name] == [f"{row['auroc']:.2f}", *filter(None, [bounds]), *shown], name
    layers = " ".join(map(str, facts["report"]["query_token"]["layers"]))
    assert f"query_token           layers chosen, by fold: {layers}" in below
    assert "AUROC of query_token minus that of" in below
    assert max(map(len, out.splitlines())) <= 80


def test_json_has_the_names_of_the_report(facts):
    own = ["vision_token", "query_token", "multimodal", "vision"]
    names = ["first-token entropy", "mean log-probability", "least log-probability"]
    names = ["question text alone", *names, "answer length", "labels shuffled", "chance"]
    assert set(facts["report"]) == {*own, *names}
    for name in facts["report"].keys() - {"chance"}:
        keys = {"auroc", "auroc_low", "auroc_high", "layers", *COLUMNS}
        assert set(facts["report"][name]) == keys
    assert set(facts["differences"]) == set(names) - {"labels shuffled", "chance"}
    assert (facts["positive"], facts["seed"]) == ("wrong", 0)
    assert facts["scikit_learn"] == sklearn.__version__


# What it is compared with


def test_baselines_are_scikit_learns_own(known, facts):
    table, _ = inspect_h5.load_embeddings(known[0], VISION)
    place = pd.Series(range(len(table)), table["question_id"])
    numbers = {
        "first-token entropy": table["first_token_entropy"],
        "mean log-probability": table["answer_logprobs"].map(lambda x: sum(x) / len(x)),
        "least log-probability": table["answer_logprobs"].map(min),
        "answer length": table["num_answer_tokens"],
    }
    for name, values in numbers.items():
        aurocs = []
        for fold in facts["folds"]:
            test = place[fold["question_id"]].to_numpy()
            train = np.setdiff1d(place, test)
            auroc = roc_auc_score(known[1][test], values[test])
            is_below = roc_auc_score(known[1][train], values[train]) < 0.5
            aurocs.append(1 - auroc if is_below else auroc)
        assert facts["report"][name]["auroc"] == pytest.approx(np.mean(aurocs), abs=1e-6)
    assert all(facts["report"][name]["auroc"] > 0.7 for name in MEANS)  # wrong: less likely
    assert facts["report"]["answer length"]["auroc"] == 0.5  # all have as many
    assert abs(facts["report"]["question text alone"]["auroc"] - 0.5) < 0.1


def test_the_text_baseline_is_scikit_learns_own(known, facts, exported):
    """A grid search over the inner folds, refitted on all training folds."""
    labels = known[1]
    _, fold_of, _ = exported
    questions = inspect_h5.load_embeddings(known[0], VISION)[0]["question"].to_numpy(str)
    pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True)
    pipeline = make_pipeline(pieces, LogisticRegression(max_iter=5000))
    grid = {"logisticregression__C": inspect_h5.STRENGTHS}
    aurocs = []
    for number in range(5):
        train = fold_of != number
        folds = PredefinedSplit(fold_of[train])
        search = GridSearchCV(pipeline, grid, scoring="roc_auc", cv=folds)
        scores = search.fit(questions[train], labels[train]).decision_function(questions)
        aurocs.append(roc_auc_score(labels[~train], scores[~train]))
    found = facts["report"]["question text alone"]["auroc"]
    assert found == pytest.approx(np.mean(aurocs), abs=2e-3)


def test_another_run_beside(known, tmp_path, capsys):
    """The same questions about a black picture, in another order: rows of its own, same folds."""
    directory, labels = known
    rng = np.random.default_rng(8)
    table = make_table(labels, rng).assign(image_id="black.png", image_sha256="black")
    states = make_states(labels, rng)
    for name in states:
        states[name] = rng.standard_normal(states[name].shape)
    order = rng.permutation(len(labels))
    states[f"{KINDS[0]}/layer_3"] = inspect_h5.load_embeddings(directory, KINDS[1], 3)[1]
    shuffled = {name: matrix[order] for name, matrix in states.items()}
    write_run(tmp_path / "blind", table.iloc[order], shuffled, max_new_tokens=0)
    flags = [directory, "--probe", "answer_is_wrong", "--layer", 3]
    facts = run_json(*flags, "--beside", f"blind={tmp_path / 'blind'}")
    report = facts["report"]
    assert report["blind: query_token"]["auroc"] == pytest.approx(0.5, abs=0.08)
    # The states of the first run, under another name: every figure is the same.
    assert report["blind: vision_token"] == report["query_token"]
    assert facts["differences"]["blind: query_token"]["low"] > 0.2
    assert facts["differences"]["blind: vision_token"]["auroc"] == 0
    assert facts["best"] == "query_token"
    write_run(tmp_path / "less", table[1:], states, max_new_tokens=0)
    err = one_line(capsys, *flags, "--beside", f"less={tmp_path / 'less'}")
    assert "--beside less: 1 of 600 samples are not in" in err
    assert "first 'q0000'" in err


# --save, --seed, --positive


def test_what_is_saved_can_be_probed_again(known, facts, saved):
    """Texts, labels, folds from 1 on, out-of-fold probabilities; and its labels are read back."""
    table = pd.read_csv(saved, dtype={"question_id": str})
    names = ["question_id", "image_id", "question", "ground_truth_answer", "answer", "label"]
    assert list(table)[:7] == [*names, "fold"]
    assert set(table) - set(names) - {"fold"} == facts["report"].keys() - {"chance"}
    assert (table["label"] == np.where(known[1], "wrong", "right")).all()
    for number, fold in enumerate(facts["folds"], start=1):
        assert list(table["question_id"][table["fold"] == number]) == fold["question_id"]
    for name in ("query_token", "vision", "first-token entropy"):
        brier = metrics.brier_score_loss(known[1], table[name])
        aurocs = [
            roc_auc_score(fold["label"] == "wrong", fold[name]) for _, fold in table.groupby("fold")
        ]
        assert facts["report"][name]["auroc"] == pytest.approx(np.mean(aurocs))
        assert facts["report"][name]["brier"] == pytest.approx(brier)
    again = run_json(known[0], "--probe", f"{saved}:label", "--representation", VISION)
    for key in ("classes", "positive", "folds"):
        assert again[key] == facts[key]
    assert again["report"]["vision"] == facts["report"]["vision"]


def test_samples_without_a_label_are_saved_to_be_labelled(tiny, tmp_path):
    label = write_labels(tmp_path / "labels.csv", tiny[1], ["0.1", "", "0.9"] * 20)
    flags = ["--above", "0.5", "--representation", VISION, "--save", tmp_path / "saved.csv"]
    facts = run_json(tiny[0], "--probe", label, *flags)
    table = pd.read_csv(tmp_path / "saved.csv", keep_default_na=False)
    assert list(table["label"]) == ["at most 0.5", "", "more than 0.5"] * 20
    assert (table.loc[table["label"] == "", ["fold", "vision"]] == "").all(axis=None)
    again = run_json(tiny[0], "--probe", f"{tmp_path / 'saved.csv'}:label", *flags[2:4])
    assert (again["classes"], again["folds"]) == (facts["classes"], facts["folds"])


def test_the_seed_decides_all_that_is_random(tiny):
    flags = [tiny[0], "--probe", "answer_is_wrong", "--representation", VISION]
    one, same, other = (run_json(*flags, "--seed", seed) for seed in (1, 1, 2))
    assert one == same
    assert one["seed"] == 1
    assert one["folds"] != other["folds"]
    assert one["report"]["labels shuffled"] != other["report"]["labels shuffled"]


def test_the_positive_class_is_chosen(tiny, tmp_path, capsys):
    """By default `wrong`, else the last; AUPRC and precision are those of the class."""
    flags = [tiny[0], "--probe", "answer_is_wrong", "--representation", VISION]
    default = run_json(*flags)
    assert (default["positive"], default["classes"]) == ("wrong", {"right": 40, "wrong": 20})
    turned = run_json(*flags, "--positive", "right")
    assert turned["positive"] == "right"
    assert turned["report"]["chance"]["precision"] == pytest.approx(2 / 3)
    label = write_labels(tmp_path / "labels.csv", tiny[1], ["yes", "wrong", ""] * 20)
    flags = [tiny[0], "--probe", label, "--representation", VISION]
    assert run_json(*flags)["positive"] == "wrong"
    err = one_line(capsys, *flags, "--positive", "no")
    assert "--positive no: the classes are 'wrong', 'yes'" in err


# What the README shows: the same model as a judge, between two runs of the extractor
ASK_THE_JUDGE = find_blocks()["python", "ask"]
READ_THE_JUDGE = find_blocks()["python", "read"]


def test_the_same_model_judges(tiny, tmp_path, monkeypatch):
    directory, table, states = tiny
    monkeypatch.chdir(tmp_path)
    flags = [directory, "--representation", VISION, "--probe"]
    run_json(*flags, "answer_is_wrong", "--save", "labels.csv")
    exec(ASK_THE_JUDGE, {})
    asked = pd.read_csv("judge.csv", keep_default_na=False)
    assert list(asked) == ["question_id", "image_id", "question", "answer"]
    first = f'Q: {table["question"][0]} Does "It is blue." mean the same as "red"? Say yes or no.'
    assert asked["question"][0] == first
    said = ["Yes.", "No, it does not.", "Maybe"] * 20
    write_run(tmp_path / "judge", table.assign(answer=said), states)
    exec(READ_THE_JUDGE, {})
    facts = run_json(*flags, "judged.csv:label")
    assert (facts["classes"], facts["num_without_label"]) == ({"right": 20, "wrong": 20}, 20)


# Controls


def test_shuffled_labels_keep_groups_together():
    groups = np.arange(60) // 6
    task = make_task(groups < 5, groups)
    labels = inspect_h5.shuffle_labels(task).labels
    assert labels.sum() == task.labels.sum()
    assert (labels.reshape(10, 6).std(axis=1) == 0).all()
    assert (labels != task.labels).any()


def test_shuffled_labels_notice_a_planted_leak(tmp_path, capsys, monkeypatch):
    """Folds that know nothing of images, where the label goes by the image."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(60) % 2 == 0, NUM_QUESTIONS)
    write_run(tmp_path, make_table(labels, rng), make_states(labels, rng, width=4))
    flags = [tmp_path, "--probe", "answer_is_wrong", "--representation", VISION]
    status, out, _ = inspect(capsys, *flags)
    assert status == 0
    assert "leaks" not in out

    def split_at_random(labels, groups, seed):
        return np.random.default_rng(0).permutation(len(labels)) % 5

    monkeypatch.setattr(inspect_h5, "split_by_group", split_at_random)
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
    """Pairs as in public data sets: the label that a reader gives, or none."""
    pairs = PAIRS[PAIRS["source"] == source]
    for truth, answer, wrong in zip(pairs["ground_truth"], pairs["answer"], pairs["wrong"]):
        found = label([truth, "x"], [answer, "x"])[0]
        assert found in ([wrong, "0"], ["", "0"]), (truth, answer)


def test_most_pairs_have_a_label():
    found = [
        label([truth], [answer or " "])[0]
        for truth, answer in PAIRS[["ground_truth", "answer"]].values
    ]
    assert found.count([""]) < len(PAIRS) / 4


@pytest.mark.parametrize("letter", "ABCDEIXZ")
def test_every_letter_is_an_option_alike(letter):
    """A probe that knows only the letter of the truth learns nothing of the label."""
    texts = ["{} - dog", "I'd choose {} because", "<answer>{}</answer>", "({})", "{}. a dog", "{}"]
    texts += [
        "It is {}.",
        "The answer is {}",
        "Option {} it is",
        r"\boxed{{{}}}",
        "{} dog is there",
    ]
    found = label([letter] * len(texts), [text.format(letter) for text in texts])[0]
    assert found == ["0"] * (len(texts) - 1) + [""]
    other = "B" if letter == "A" else "A"
    found = label([letter] * len(texts), [text.format(other) for text in texts])[0]
    assert found == ["1"] * (len(texts) - 1) + [""]


def test_annotators_of_vqav2_are_read_by_their_answers():
    """Ten dicts: what three gave is right, words of keys and of doubt are not."""
    given = ["net"] * 6 + ["rope"] * 3 + ["maybe it"]
    dicts = [
        {"answer": answer, "answer_confidence": "maybe", "answer_id": number}
        for number, answer in enumerate(given, start=1)
    ]
    answers = ["A net.", "rope", "yes", "maybe it", "answer", "10"]
    for written in (str(dicts), json.dumps(dicts)):
        labels, notes = label([written] * 6, answers)
        assert labels == ["0", "0", "1", "1", "1", "1"]
        assert notes == [
            "6 ground truths are annotators' answers: right is what at least 3 of them gave"
        ]
    with pytest.raises(ValueError, match="bring labels of your own"):
        label(["[{'text': 'net'}]"], ["net"])


def test_one_and_zero_are_yes_and_no_where_answers_are():
    """HallusionBench: truths 1 and 0, answers that begin with yes or no; but not counts."""
    answers = ["Yes, it is.", "No.", "no", "Yes"]
    labels, notes = label(["1", "1", "0", "0.0"], answers)
    assert labels == ["0", "1", "0", "1"]
    assert notes == ["ground truths are 0 and 1: read as yes and no"]
    assert label(["1", "0", "1", "0"], ["1 dog", "there are 2", "none", "0"]) == (list("0110"), [])
    assert label(["1", "0", "2", "0"], answers) == (list("1011"), [])


def test_the_notes_count_what_the_rule_does_not_see():
    truths = ["a; b", "['a', 'b']", "a", "狗", "แมว; ねこ", "yes", "?"]
    labels, notes = label(truths, ["(B)", "(B)", "(C)", "狗", "x", "it is", "x"])
    assert labels == ["0", "0", "1", "", "", "", ""]
    assert [note.split()[0] for note in notes[:1]] == ["3"]
    assert "several answers" in notes[0]
    assert sorted(notes[1:]) == [
        "no label: 1 answers declare neither yes nor no",
        "no label: 1 answers have a truth without words",
        "no label: 2 answers or their truths are in a script whose words cannot be told apart",
    ]


def test_the_rule_is_applied_and_printed(tiny, capsys):
    directory, table, states = tiny
    table["ground_truth_answer"] = ["red", "blue", "?!"] * 20
    table["answer"] = ["red"] * 60
    write_run(directory, table, states)
    status, out, _ = inspect(capsys, directory, "--probe", "answer_is_wrong", "--layer", 3)
    assert status == 0
    assert "20 × right, 20 × wrong; 20 without a label" in out
    assert out.count("right     red → red") == out.count("wrong     blue → red") == 3
    assert " ".join(inspect_h5.RULE.split()) in " ".join(out.split())


LABELS = {
    "two texts": (["Yes", "no", "", "no"], [], {"no": 30, "Yes": 15}, 15),
    "two numbers": (["9", "10", "9", "9"], [], {"9": 45, "10": 15}, 0),
    "None is a value": (["None", "NA", " NA ", "None"], [], {"NA": 30, "None": 30}, 0),
    "above": (
        ["0.2", "7e-1", "0.5", ""],
        ["--above", "0.5"],
        {"at most 0.5": 30, "more than 0.5": 15},
        15,
    ),
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


def test_probe_and_plot_write_the_table_and_the_picture(tiny, tmp_path, capsys):
    flags = ["--layer", 3, "--plot", tmp_path / "x.png", "--beside", f"blind={tiny[0]}"]
    status, out, err = inspect(capsys, tiny[0], "--probe", "answer_is_wrong", *flags)
    assert (status, err) == (0, "")
    assert "blind: query_token" in out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_written_is_said_before_the_probe_starts(
    tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(inspect_h5, "probe", lambda *_: pytest.fail("it started"))
    flags = [tiny[0], "--probe", "answer_is_wrong"]
    for more in (["--plot", tmp_path / "none/x.png"], ["--save", tmp_path / "none/x.csv"]):
        assert "there is no directory" in one_line(capsys, *flags, *more)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in one_line(capsys, *flags, "--plot", tmp_path / "x.png")


def test_save_does_not_overwrite_what_was_given(tiny, tmp_path, capsys, monkeypatch):
    """Neither the file of labels or groups, also by another name, nor the last one if it fails."""
    label = write_labels(tmp_path / "my.csv", tiny[1], ["0", "1"] * 30)
    path = tmp_path / "my.csv"
    before = path.read_bytes()
    (tmp_path / "link.csv").symlink_to(path)
    flags = [tiny[0], "--representation", VISION, "--probe"]
    for more in (
        [label],
        ["answer_is_wrong", "--by", label],
        ["answer_is_wrong", "--group", label],
    ):
        for name in ("my.csv", "link.csv"):
            err = one_line(capsys, *flags, *more, "--save", tmp_path / name)
            assert f"--save would overwrite the file of {label}" in err

    def fill_the_disk(_, path, **kwargs):
        Path(path).write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fill_the_disk)
    assert inspect(capsys, *flags, "answer_is_wrong", "--save", path)[0] == 1
    assert path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("*.csv*")) == ["link.csv", "my.csv"]


def test_a_group_for_each_row(tiny, tmp_path):
    label = write_labels(tmp_path / "labels.csv", tiny[1], ["0", "1"] * 30)
    group = f"{tmp_path}/labels.csv:question_id"
    facts = run_json(tiny[0], "--probe", label, "--group", group, "--representation", VISION)
    assert facts["num_groups"] == 60


def test_a_table_that_is_finished_is_printed(tiny, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(inspect_h5, "plot_probe", fail)
    flags = ["--representation", VISION, "--plot", tmp_path / "x.png"]
    status, out, err = inspect(capsys, tiny[0], "--probe", "answer_is_wrong", *flags)
    assert (status, err) == (1, "No space left on device\n")
    assert "\nreport" in out


def test_progress_is_a_line_now_and_then_without_a_terminal(tiny, capsys, monkeypatch):
    monkeypatch.setattr(inspect_h5, "PROGRESS_SECONDS", 0)
    _, _, err = inspect(capsys, tiny[0], "--probe", "answer_is_wrong", "--layer", 3)
    assert "1 of 3 matrices" in err


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
    "no file": (":label", {}, "':label': CSV:COLUMN names no file"),
    "the ids": ("labels.csv:question_id", {}, "60 values instead of two"),
    "a file": ("none.csv:label", {}, "none.csv cannot be read"),
    "no id matches": ("others.csv:label", {}, "60 of 60 samples are not in others.csv, first ["),
    "leading zeros": ("others.csv:label", {}, "['q0000'] (it has ['0']); did leading zeros"),
    "no value": ("empty.csv:label", {}, "empty.csv:label: no sample has a value there"),
    "semicolons": ("semicolons.csv:label", {}, "separated by semicolons or tabs: save it with"),
    "trailing commas": ("commas.csv:label", {}, "60 rows have more or fewer fields than the h"),
    "no question_id": ("no_id.csv:label", {}, "no column question_id; it has ['id', 'label']"),
    "a column twice": ("columns.csv:label", {}, "several columns label; it has ['question_id',"),
    "an id twice": ("twice.csv:label", {}, "twice.csv: question_id 'q0007' is there twice"),
    "many texts": ("texts.csv:label", {}, "3 values instead of two, 'a', 'b', 'c'; leave cells"),
    "three numbers": (
        "unlabelled.csv:label",
        {},
        "'-1', '0', '1'; leave cells without a label empty",
    ),
    "nan": ("nan.csv:label", {}, "'1', 'nan'; leave cells without a label empty"),
    "spellings": ("spellings.csv:label", {}, "'false', 'False', 'true'; some differ in upper and"),
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
    write_labels("unlabelled.csv", table, ["-1", "0", "1"] * 20)
    write_labels("nan.csv", table, ["1", "nan", "1"] * 20)
    write_labels("spellings.csv", table, ["false", "False", "true"] * 20)
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
    note, few = facts["notes"]
    assert few == "9 images or groups are few: intervals are rough"
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
        (["--probe", "x.csv:y", "--above", "nan"], "--above: a finite number, not nan"),
        (["--probe", "answer_is_wrong", "--verify"], "does not go with"),
        (["--probe", "answer_is_wrong", "--export", "x.npz"], "does not go with"),
        (["--probe", "answer_is_wrong", "--plot", "x.gif"], ".png"),
        (["--probe", "answer_is_wrong", "--plot", "x.png", "--color-by", "answer"], "--color-by"),
        (["--probe", "answer_is_wrong", "--max-samples", "9"], "--max-samples"),
        (["--probe", "answer_is_wrong", "--probe-model", "tree"], "tree"),
        (["--probe", "answer_is_wrong", "--group", "scenes.csv"], "--group: it needs CSV:COLUMN"),
        (["--probe", "answer_is_wrong", "--by", "x"], "--by: it needs CSV:COLUMN"),
        (["--probe", "answer_is_wrong", "--seed", "-1"], "--seed: a number from 0"),
        (["--probe", "answer_is_wrong", "--save", "x.txt"], "must end in one of .csv"),
        (["--probe", "answer_is_wrong", "--beside", "blind"], "--beside: it needs NAME=DIR"),
        (
            ["--probe", "answer_is_wrong", "--beside", "a=x", "--beside", "a=y"],
            "each run a name of its own",
        ),
        (["--seed", "1"], "--seed does not go with view"),
        (["--probe-model", "mlp"], "--probe-model does not go with view"),
        (["--above", "1"], "--above does not go with view"),
    ],
)
def test_wrong_usage_is_status_2(tiny, capsys, flags, message):
    status, out, err = inspect(capsys, tiny[0], *flags)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
