"""The script as a person runs it: files, flags, last line, exit status, several processes."""

import csv
import re
import shutil
import sys
from pathlib import Path

import easy_vqa
import h5py
import pytest
from conftest import CSV, IMAGES, assert_same_samples, read_csv, read_samples

LAST_LINE = re.compile(
    r"Extracted (\d+) of (\d+) samples \((\d+) failed, (\d+) already done\) "
    r"in \d+\.\d s: \d+\.\d\d samples/s"
)


def last_line(result):
    """extracted, all, failed, already done"""
    match = LAST_LINE.fullmatch(result.stderr.splitlines()[-1])
    assert match, result.stderr
    return tuple(map(int, match.groups()))


@pytest.fixture(scope="module")
def plain_run(run_script, tmp_path_factory):
    """Parts of 7, one question a pass."""
    output_dir = tmp_path_factory.mktemp("plain") / "out"
    result = run_script(output_dir, "--checkpoint-interval", "7", "--batch-size", "1")
    assert result.returncode == 0, result.stderr
    return output_dir, result


def test_what_a_run_leaves(plain_run):
    output_dir, result = plain_run
    assert last_line(result) == (28, 28, 0, 0)
    assert result.stdout == ""
    names = {path.name for path in output_dir.iterdir() if not path.name.startswith(".")}
    assert names == {f"gemma3_12b_embeddings_part_{k:03d}.h5" for k in (1, 2, 3, 4)}
    samples, rows = read_samples(output_dir), read_csv()
    assert samples.keys() == rows.keys()
    for question_id, row in rows.items():
        sample = samples[question_id]
        assert (sample["question"], sample["image_id"]) == (row["question"], row["image_id"])
        assert sample["ground_truth_answer"] == row["answer"]
        assert sample["vision_token_pos"] == 260
        assert sample["query_token_pos"] == sample["num_prompt_tokens"] - 1


def test_root_attributes(plain_run):
    with h5py.File(plain_run[0] / "gemma3_12b_embeddings_part_002.h5") as file:
        attributes = dict(file.attrs)
        assert all(isinstance(item, h5py.Group) for item in file.values())
    expected = {
        "model_type": "gemma-3-0.2m-multimodal",
        "device": "cpu",
        "dtype": "float32",
        "num_samples": 7,
        "num_layers": 8,
        "hidden_size": 32,
        "vision_hidden_size": 24,
        "max_new_tokens": 6,
        "checkpoint_interval": 7,
        "schema_version": 1,
        "dataset": "vqa.csv",
        "attn_implementation": "sdpa",
        "image_processor": "Gemma3ImageProcessorPil",
        "prompt": "<bos><start_of_turn>user\n<start_of_image>{question}<end_of_turn>\n"
        "<start_of_turn>model\n",
    }
    assert {name: attributes[name] for name in expected} == expected
    assert attributes["layers"].tolist() == [0, 2, 4, 6, 7]
    others = {"model_name", "model_revision", "created_at", "dataset_sha256", "torch_version"}
    assert others | {"transformers_version", "python_version"} <= attributes.keys()


@pytest.mark.parametrize("batch_size", ["5", "64"])
def test_the_batch_size_changes_nothing(plain_run, run_script, tmp_path, batch_size):
    flags = ["--checkpoint-interval", "7", "--batch-size", batch_size]
    assert run_script(tmp_path, *flags).returncode == 0
    assert_same_samples(read_samples(tmp_path), read_samples(plain_run[0]))


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"],
        ["-m", "torch.distributed.run", "--nproc_per_node", "3"],
    ],
    ids=["accelerate 2", "torchrun 3"],
)
def test_the_number_of_processes_changes_nothing(plain_run, run_script, tmp_path, launcher):
    flags = ["--checkpoint-interval", "7"]
    result = run_script(tmp_path, *flags, launcher=[sys.executable, *launcher])
    assert result.returncode == 0, result.stderr
    assert last_line(result) == (28, 28, 0, 0)
    assert_same_samples(read_samples(tmp_path), read_samples(plain_run[0]))
    (tmp_path / "gemma3_12b_embeddings_part_003.h5").unlink()
    assert last_line(run_script(tmp_path, *flags)) == (7, 28, 0, 21)
    assert_same_samples(read_samples(tmp_path), read_samples(plain_run[0]))


def test_flags_of_what_is_extracted(plain_run, run_script, tmp_path):
    flags = ["--layers", "-1,2", "--max-new-tokens", "0", "--storage-dtype", "bfloat16"]
    result = run_script(tmp_path, *flags, "--compression", "gzip")
    assert result.returncode == 0, result.stderr
    expected = read_samples(plain_run[0])
    for question_id, sample in read_samples(tmp_path).items():
        kinds = ("vision_token", "query_token", "multimodal")
        names = {f"{kind}_representation/layer_{i}" for kind in kinds for i in (2, 7)}
        assert names == {name for name in sample if "/" in name}
        assert (sample["answer"], sample["num_answer_tokens"]) == ("", 0)
        for name in names:
            difference = sample[name] - expected[question_id][name]
            assert abs(difference).max() <= 2**-8 * abs(expected[question_id][name]).max()


def test_three_rows_first_and_then_the_rest(plain_run, run_script, tmp_path):
    flags = ["--checkpoint-interval", "7"]
    result = run_script(tmp_path, *flags, "--test")
    assert result.returncode == 0, result.stderr
    assert last_line(result) == (3, 3, 0, 0)
    assert read_samples(tmp_path).keys() == set(list(read_csv())[:3])
    lines = result.stdout.splitlines()
    assert [line[:4] for line in lines[:4]] == ["ok  "] * 4
    assert "28 rows about 8 images" in lines[-1]
    assert last_line(run_script(tmp_path, *flags)) == (25, 28, 0, 3)
    assert_same_samples(read_samples(tmp_path), read_samples(plain_run[0]))


def test_a_failed_check_of_the_test_run_is_an_error(run_script, tmp_path, monkeypatch):
    """A model whose attention ignores the image mask must not pass."""
    import run_gemma3_extraction as script

    original = script.plain_forward
    monkeypatch.setattr(
        script,
        "plain_forward",
        lambda *args, has_mask=True: original(*args, has_mask=True),
    )
    model = Path(__file__).parent / "tiny_gemma3"
    flags = ["--vqa-dataset", CSV, "--images-dir", IMAGES, "--output-dir", tmp_path, "--test"]
    flags += ["--model", model, "--device", "cpu", "--max-new-tokens", "2"]
    assert script.main([str(flag) for flag in flags]) == 1


def test_200_rows_of_easy_vqa_come_back(run_script, tmp_path):
    questions, answers, image_ids = easy_vqa.get_train_questions()
    paths = easy_vqa.get_train_image_paths()
    with open(tmp_path / "easy.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("question_id", "image_name", "question", "gt_answer"))
        for i in range(200):
            writer.writerow((f"{i:05d}", Path(paths[image_ids[i]]).name, questions[i], answers[i]))
    flags = ["--vqa-dataset", tmp_path / "easy.csv", "--images-dir", Path(paths[0]).parent]
    result = run_script(tmp_path / "out", *flags, "--checkpoint-interval", "50")
    assert last_line(result) == (200, 200, 0, 0)
    samples = read_samples(tmp_path / "out")
    assert list(samples) == [f"{i:05d}" for i in range(200)]  # sorted by image, as it stands
    for i, sample in enumerate(samples.values()):
        assert sample["part"] == f"gemma3_12b_embeddings_part_{i // 50 + 1:03d}.h5"
        assert sample["question"] == questions[i]
        assert sample["ground_truth_answer"] == answers[i]
        assert sample["row"] == i


def test_the_model_ships_as_its_script_makes_it(tmp_path):
    import make_tiny_gemma3

    make_tiny_gemma3.main(tmp_path)
    shipped = Path(__file__).parent / "tiny_gemma3"
    names = {path.name for path in shipped.iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    for name in names:
        assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes(), name
    assert sum((shipped / name).stat().st_size for name in names) < 2e6


def test_rows_added_at_the_end_go_on(plain_run, run_script, tmp_path):
    output_dir = tmp_path / "out"
    shutil.copytree(plain_run[0], output_dir)
    before = read_samples(output_dir)
    text = CSV.read_text(encoding="utf-8") + "new,circle.png,what is new?,yes\r\n"
    (tmp_path / "vqa.csv").write_text(text, encoding="utf-8", newline="")
    flags = ["--vqa-dataset", tmp_path / "vqa.csv", "--checkpoint-interval", "7"]
    assert last_line(run_script(output_dir, *flags)) == (1, 29, 0, 28)
    after = read_samples(output_dir)
    assert after.pop("new")["answer"] is not None
    assert_same_samples(after, before, bound=0)
