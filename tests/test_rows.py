"""Reading the CSV, planning parts, opening images."""

import dataclasses
import hashlib

import pytest
from conftest import CSV, HEADER, IMAGES, read_csv, write_csv
from PIL import Image

import run_gemma3_extraction as script


def test_text_survives_to_the_letter(tmp_path):
    rows = list(map(dataclasses.astuple, script.read_rows(CSV)))
    assert rows == [tuple(row[name] for name in HEADER) for row in read_csv().values()]
    assert {"None", "007", "NA", ""} <= {row[3] for row in rows}
    assert any("\n" in row[2] for row in rows)
    odd = [
        ("007", "a b.png", ' "quoted", with\nlines\r\nand , commas ', "NA"),
        ("7", "日本.png", "наконец?", "None"),
        ("nan", "c.png", "q" * 200_000, "nan"),
    ]
    path = write_csv(tmp_path / "rows.csv", odd)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n\r\n")  # BOM, blank lines
    assert list(map(dataclasses.astuple, script.read_rows(path))) == odd


def test_aliases_order_and_further_columns(tmp_path):
    rows = [script.Row("01", "a.png", "why?", "007"), script.Row("1", "b.png", "why?", "")]
    header = ("gt_answer", "split", "image_name", "question_id", "question")
    lines = [(row.ground_truth, "x", row.image_id, row.question_id, row.question) for row in rows]
    assert script.read_rows(write_csv(tmp_path / "rows.csv", lines, header)) == rows


H = "question_id,image_id,question,answer\n"
BAD_CSVS = {
    "empty": ("", "no rows"),
    "blank lines": ("\n\n\n", "no rows"),
    "only a header": (H, "no rows"),
    "duplicate ids": (H + "007,a.png,q,b\n7,a.png,q,b\n007,c.png,q,b\n", "line 4.*'007'.*twice"),
    "short line": (H + "1,a.png,q,b\n2,a.png,q\n", "line 3: fewer fields than the header.*commas"),
    "long line": (H + "1,a.png,where, and how?,b\n", "line 2: more fields than the header.*commas"),
    "NUL byte": (H + "1,a.png,q\x00r,b\n", "line 2.*NUL"),
    "empty id": (H + "1,a.png,q,b\n,a.png,q,b\n", "line 3.*question_id is empty"),
    "blank id": (H + "  ,a.png,q,b\n", "line 2.*question_id is empty"),
    "missing column": ("question_id,image_id,answer\n1,a.png,b\n", r"column question is not .*\]$"),
    "no answers": ("question_id,image_id,question\n1,a.png,b\n", "column answer or gt_answer is"),
    "column twice": (
        "question_id," + H + "1,1,a.png,q,b\n",
        "question_id and question_id are both there",
    ),
    "alias twice": (
        "gt_answer,gt_answer," + H[:-8] + "\n",
        "gt_answer and gt_answer are both there",
    ),
    "both answers": ("gt_answer," + H + "b,1,a.png,q,c\n", "gt_answer and answer are both there"),
    "both images": ("image_name," + H + "a,1,a,q,b\n", "image_name and image_id are both there"),
    "open quote": (H + '1,a.png,"q,b\n2,a.png,q,b\n', "line 3.*quotes"),
    "text after a quote": (H + '1,a.png,q,b\n2,a.png,"what" is it?,b\n', "line 3.*quotes"),
    "semicolons": (H.replace(",", ";") + "1;a.png;q;b\n", "semicolons or tabs: save.* commas"),
    "tabs": (H.replace(",", "\t") + "1\ta.png\tq\tb\n", "semicolons or tabs: save.* commas"),
    "a space": (H.replace(",", ", ") + "1,a.png,q,b\n", "column image_id .*not there.*' image_id'"),
    "capitals": (H.replace("question_id", "Question_ID"), "question_id is not there.*'Question_ID"),
    "an alias": (H.replace("image_id", "Image_Name"), "image_name is not there.*'Image_Name'"),
    "latin-1": ((H + "1,a.png,où?,b\n").encode("latin-1"), "rows.csv is not UTF-8"),
    "utf-16": ((H + "1,a.png,où?,b\n").encode("utf-16"), "rows.csv is not UTF-8"),
    "nowhere": (None, "No such file"),
}


@pytest.mark.parametrize("name", BAD_CSVS)
def test_bad_csv_is_refused(name, tmp_path):
    content, reason = BAD_CSVS[name]
    path = tmp_path / "rows.csv"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(script.ExtractionError, match=reason) as caught:
        script.read_rows(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "interval", "plan"),
    [("abacbabc", 3, ["025", "146", "37"]), ("aaabbcccc", 2, ["01", "23", "45", "67", "8"])],
)
def test_parts_follow_images_as_they_first_appear(images, interval, plan):
    rows = [script.Row(str(i), image, "", "") for i, image in enumerate(images)]
    parts = script.plan_parts(rows, interval)
    assert ["".join(row.question_id for row in part) for part in parts] == plan


def test_images_are_upright_rgb_and_known_by_their_files(tmp_path, monkeypatch):
    for path in IMAGES.iterdir():
        with Image.open(path) as image:
            size = image.size[::-1] if path.name == "turned.jpg" else image.size
        found, sha256, is_transparent = script.open_image(IMAGES, path.name)
        assert (found.mode, found.size) == ("RGB", size)
        assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert not is_transparent
    turned, _, _ = script.open_image(
        IMAGES, "turned.jpg"
    )  # lies 300 x 150, the bar below its middle
    assert turned.getpixel((turned.width // 3, 3 * turned.height // 4)) > (200, 200, 200)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "d.png").touch()
    monkeypatch.chdir(tmp_path)
    for directory in (tmp_path, script.Path("."), script.Path("x/..")):
        assert script.find_image(directory, "b/c/../d.png") == tmp_path / "b" / "d.png"
