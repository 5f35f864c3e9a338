"""All that the README shows is run as it is written, with the tiny model in place of the 12B.

A fenced block with a name after its language is run, in the README's order, in one copy of the
repository: ```bash NAME and ```python NAME. A ```text NAME is what the block of that name prints.
So are commands within the text that look at the demo. A block without a name is not run: the tests
themselves, launchers that need cards, the bibliography.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CSV, IMAGES, MODEL, README, ROOT, find_blocks

import inspect_h5
import run_gemma3_extraction

TEXT = README.read_text(encoding="utf-8")
BLOCKS = find_blocks()
SCRIPTS = ("run_gemma3_extraction.py", "inspect_h5.py")
TOLERANCE = 0.1  # of a printed decimal: a bfloat16 is rounded otherwise on another CPU
VARYING = (  # what depends on the machine and its load
    r"torch \S+",
    r"peak memory .*",
    r"\d+ GB are free",
    r"take \S+ h at \S+ samples/s",
    r"have \d+ tokens as here",
)
DECIMAL = re.compile(r"\d+\.\d+(?:e[-+]\d+)?")
ELSEWHERE = {  # options of other programs
    *("--num_processes", "--nproc-per-node", "--array", "--gres", "--signal", "--requeue"),
    *("--dist", "--paper", "--kills", "--signals", "--size"),
}
SENTENCES = (  # which issue 27 took as examples of how not to write
    "Read it from the control",
    "gets what is common to its questions for nothing",
    "where both of a pair are there",
    "costs the parts in hand",
    "What it has no room for",
    "Times as fast as row by row",
    "The last answers of a run have few beside them",
    "for each operation the largest of one launch",
    "data sets may stand side by side that differ in nothing that a vector depends on",
    "each part in hand stands whole",
)


def find_commands():
    """What is run, in the README's order: (name, language, text)."""
    found = re.finditer(
        r"^```(?P<language>bash|python) (?P<name>\w+)\n(?P<text>.*?)^```$"
        r"|`(?P<inline>python inspect_h5\.py output/demo [^`]+)`",
        TEXT,
        re.MULTILINE | re.DOTALL,
    )
    for match in found:
        if match["inline"]:
            yield match["inline"].split()[3].strip("-"), "bash", match["inline"]
        else:
            yield match["name"], match["language"], match["text"]


COMMANDS = list(find_commands())


def adapt(text):
    """A command line for the tiny model, and without the environment that is there already."""
    if text.startswith("python3 -m venv "):
        text = " && ".join(part for part in text.split(" && ") if part.startswith("python "))
    tiny = f"python {SCRIPTS[0]} --model tests/tiny_gemma3 --device cpu"
    return text.replace(f"python {SCRIPTS[0]}", tiny)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All commands of the README, run one after the other: their ends by name."""
    root = tmp_path_factory.mktemp("readme")
    for name in SCRIPTS:
        shutil.copy(ROOT / name, root)
    shutil.copytree(MODEL, root / "tests" / MODEL.name)
    shutil.copytree(CSV.parent, root / "tests" / CSV.parent.name)
    (root / "vqa.csv").symlink_to(CSV)
    (root / "images").symlink_to(IMAGES)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ends = {}
    for name, language, text in COMMANDS:
        words = [sys.executable, "-c", text]
        if language == "bash":
            words = ["bash", "-euo", "pipefail", "-c", adapt(text)]
        ends[name] = subprocess.run(
            words, cwd=root, env=environment, capture_output=True, text=True, timeout=300
        )
    ends["files"] = {path.name for path in root.iterdir()}
    return ends


@pytest.mark.parametrize("name", [name for name, _, _ in COMMANDS])
def test_a_command_runs(name, done):
    assert done[name].returncode == 0, done[name].stderr[-2000:]


def is_same_line(shown, printed):
    """The same words, and decimals that are near."""
    for varying in VARYING:
        shown, printed = re.sub(varying, "~", shown), re.sub(varying, "~", printed)
    words = [DECIMAL.sub("#", line).split() for line in (shown, printed)]
    decimals = [[float(found) for found in DECIMAL.findall(line)] for line in (shown, printed)]
    return words[0] == words[1] and decimals[0] == pytest.approx(decimals[1], abs=TOLERANCE)


def find_lines(shown, printed, start):
    """Where in `printed` the lines `shown` end, one after the other, from `start` on; or None."""
    for place in range(start, len(printed) - len(shown) + 1):
        if all(map(is_same_line, shown, printed[place:])):
            return place + len(shown)
    return None


@pytest.mark.parametrize("name", [name for language, name in BLOCKS if language == "text"])
def test_it_prints_what_is_shown(name, done):
    """`...` is for lines that the README leaves out."""
    printed = done[name].stdout.splitlines()
    place = 0
    for shown in re.split(r"^\.\.\.\n", BLOCKS["text", name], flags=re.MULTILINE):
        place = find_lines(shown.splitlines(), printed, place)
        assert place is not None, f"not printed:\n{shown}\nbut\n{done[name].stdout}"


@pytest.mark.parametrize("name", ["h5py", "load"])
def test_code_prints_its_comment(name, done):
    comment = BLOCKS["python", name].splitlines()[-1].strip()
    assert done[name].stdout == f"{comment.removeprefix('# ')}\n"


def test_what_is_said_of_the_demo_is_so(done):
    assert "`nothing wrong with 28 samples`" in TEXT
    assert done["run"].stdout == "nothing wrong with 28 samples\n"
    assert "(0 failed, 3 already done)" in done["run"].stderr  # it went on from the three rows
    files = {"labels.csv", "judge.csv", "judged.csv", "review.html", "auroc.png", "layer_6.npz"}
    assert files <= done["files"]


def test_lines_that_differ_are_noticed():
    assert is_same_line("vision   0.50±0.04", "vision 0.53±0.04")
    assert not is_same_line("vision 0.50±0.04", "vision 0.70±0.04")
    assert not is_same_line("vision 0.50±0.04", "multimodal 0.50±0.04")
    assert find_lines(["b 0.1", "c"], ["a", "b 0.1", "c", "d"], 0) == 3
    assert find_lines(["b 0.1", "d"], ["a", "b 0.1", "c", "d"], 0) is None


def test_the_strip_shows_the_prompt(prompter, processor):
    input_ids = prompter.tokenize("what color is the shape?")
    tokens = processor.tokenizer.convert_ids_to_tokens(input_ids)
    strip = "".join(re.findall(r"^token (.*)$", TEXT, re.MULTILINE)).replace(r"\n", "\n")
    strip = strip.replace("256 image soft tokens", "<image_soft_token>" * 256)
    assert strip.replace(" ", "") == "".join(tokens).replace("▁", "")
    assert f"5 ... {prompter.soft_stop - 1} " in TEXT
    assert f"▲ {prompter.soft_stop - 1}: vision token" in TEXT
    assert f"▲ {len(tokens) - 1}: query token" in TEXT
    assert f"its {len(tokens)} tokens" in TEXT


def list_options(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    return set(re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.MULTILINE)) - {"--help"}


def test_every_option_is_there_and_no_other(capsys):
    extraction = list_options(run_gemma3_extraction.main, capsys)
    inspector = list_options(inspect_h5.main, capsys)
    rows = re.findall(r"^\| `(--[\w-]+)[^|]*\| [^|]+ \|[^|]*\|$", TEXT, re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == extraction
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT))
    assert inspector <= named
    assert named - ELSEWHERE <= extraction | inspector


def test_defaults_are_the_programs():
    words = ["--vqa-dataset", "vqa.csv", "--images-dir", "images"]
    args = vars(run_gemma3_extraction.read_args(words))
    rows = re.findall(r"^\| `--([\w-]+)[^|]*\| `?([^|`]+)`? \|[^|]*\|$", TEXT, re.MULTILINE)
    in_words = {"required", "off", "see above", "first, quarters, last", "cores, at most 8", "auto"}
    for name, default in rows:
        if default not in in_words:
            assert str(args[name.replace("-", "_")]) == default, name


def test_it_is_short_and_plain():
    assert len(TEXT.splitlines()) <= 420
    running = " ".join(TEXT.split())
    assert [sentence for sentence in SENTENCES if sentence in running] == []
    assert re.findall(r"\b(?:stands|holds|tells|in hand|under way)\b", running, re.IGNORECASE) == []


def test_what_it_names_exists():
    names = re.findall(r"\]\((tests/[^)]+)\)|python (tests/\w+\.py)", TEXT)
    assert names
    for name in map("".join, names):
        assert (ROOT / name).exists(), name


def test_the_two_commands_are_two():
    lines = [line for line in TEXT.splitlines() if line.startswith("python3 -m venv ")]
    assert len(lines) == 2
    assert [line for line in lines if "python -m pytest" in line] == lines[1:]  # for .ci/run
