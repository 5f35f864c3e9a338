"""Reading the CSV, planning parts, opening images."""

import csv
import hashlib

import pytest
from conftest import CSV, IMAGES, read_csv, write_csv
from PIL import Image

import run_gemma3_extraction as script


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def texts(row):
    return row.question_id, row.image_id, row.question, row.ground_truth


# ──────────────────────────────────────────── the CSV ────────────────────────────────────────────


def test_text_survives_to_the_letter():
    rows = script.read_rows(CSV)
    expected = read_csv().values()
    names = ("question_id", "image_id", "question", "answer")
    assert list(map(texts, rows)) == [tuple(row[name] for name in names) for row in expected]
    assert [row.index for row in rows] == list(range(28))
    assert {"None", "007", "NA", ""} <= {row.ground_truth for row in rows}
    assert any("\n" in row.question for row in rows)


def test_odd_but_good_csv_is_read_to_the_letter(tmp_path):
    rows = [
        ("007", "a b.png", ' "quoted", with\nlines\r\nand , commas ', "NA"),
        ("7", "日本.png", "наконец?", "None"),
        ("nan", "c.png", "q" * 200_000, "nan"),
    ]
    path = write_csv(tmp_path / "rows.csv", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n\r\n")  # BOM, blank lines
    assert list(map(texts, script.read_rows(path))) == rows


def test_aliases_order_and_further_columns(tmp_path):
    header = "gt_answer,split,image_name,question_id,question"
    path = write(tmp_path / "a.csv", f"{header}\r\n007,x,a.png,01,why?\r\n", "utf-8-sig")
    assert script.read_rows(path) == [script.Row(0, "01", "a.png", "why?", "007")]


def test_a_column_of_our_name_goes_before_its_alias(tmp_path):
    header = "question_id,image_id,image_name,question,answer,gt_answer"
    path = write(tmp_path / "a.csv", f"{header}\n1,right,wrong,why?,right,wrong\n")
    assert script.read_rows(path) == [script.Row(0, "1", "right", "why?", "right")]


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
    "column twice": ("question_id," + H + "1,1,a.png,q,b\n", "column question_id is there twice"),
    "open quote": (H + '1,a.png,"q,b\n2,a.png,q,b\n', "line 3.*quotes"),
    "text after a quote": (H + '1,a.png,q,b\n2,a.png,"what" is it?,b\n', "line 3.*quotes"),
    "semicolons": (H.replace(",", ";") + "1;a.png;q;b\n", "semicolons or tabs: save.* commas"),
    "tabs": (H.replace(",", "\t") + "1\ta.png\tq\tb\n", "semicolons or tabs: save.* commas"),
    "a space": (H.replace(",", ", ") + "1,a.png,q,b\n", "rename ' image_id' to 'image_id'"),
    "capitals": (H.replace("question_id", "Question_ID"), "rename 'Question_ID' to 'question_id'"),
    "an alias": (H.replace("image_id", "Image_Name"), "rename 'Image_Name' to 'image_name'"),
}


@pytest.mark.parametrize("name", BAD_CSVS)
def test_bad_csv_is_refused(name, tmp_path):
    content, reason = BAD_CSVS[name]
    path = write(tmp_path / "rows.csv", content)
    with pytest.raises(script.ExtractionError, match=reason) as caught:
        script.read_rows(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_are_refused(encoding, tmp_path):
    path = write(tmp_path / "rows.csv", H + "1,a.png,où?,b\n", encoding)
    with pytest.raises(script.ExtractionError, match=r"rows\.csv is not UTF-8"):
        script.read_rows(path)


@pytest.mark.parametrize("name", ["nowhere.csv", "directory"])
def test_csv_that_is_no_file_is_refused(name, tmp_path):
    (tmp_path / "directory").mkdir()
    with pytest.raises(script.ExtractionError, match=name):
        script.read_rows(tmp_path / name)


def test_the_hash_sees_the_four_columns_only(tmp_path):
    rows = script.read_rows(CSV)
    more = [("x", *texts(row)) for row in rows]
    header = ("more", "question_id", "image_name", "question", "gt_answer")
    path = write_csv(tmp_path / "a.csv", more, header)
    with open(path, "a", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerow(("x", "last", "a.png", "q", ""))
    assert script.hash_rows(script.read_rows(path)[:-1]) == script.hash_rows(rows)
    assert script.hash_rows(script.read_rows(path)) != script.hash_rows(rows)


# ──────────────────────────────────────────── the plan ───────────────────────────────────────────


def test_parts_follow_images_as_they_first_appear():
    rows = [script.Row(i, str(i), image, "", "") for i, image in enumerate("abacbabc")]
    parts = script.plan_parts(rows, 3)
    assert {k: [row.index for row in part] for k, part in parts.items()} == {
        1: [0, 2, 5],
        2: [1, 4, 6],
        3: [3, 7],
    }


def test_a_sorted_csv_is_worked_through_as_it_stands():
    rows = [script.Row(i, str(i), image, "", "") for i, image in enumerate("aaabbcccc")]
    assert [row for part in script.plan_parts(rows, 2).values() for row in part] == rows


# ───────────────────────────────────────────── images ────────────────────────────────────────────


def test_images_are_upright_rgb_and_known_by_their_files():
    for path in IMAGES.iterdir():
        with Image.open(path) as image:
            width, height = image.size
        found, sha256 = script.open_image(IMAGES, path.name)
        assert found.mode == "RGB"
        turned = path.name == "turned.jpg"
        assert found.size == ((height, width) if turned else (width, height))
        assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    turned, _ = script.open_image(IMAGES, "turned.jpg")  # lies 300 x 150, the bar below its middle
    assert turned.getpixel((turned.width // 3, 3 * turned.height // 4)) > (200, 200, 200)


@pytest.mark.parametrize(
    "image_id", ["../a.png", "/etc/a.png", "x/../../a.png", "", " ", ".", ".."]
)
def test_no_image_id_leads_out_of_the_directory(tmp_path, image_id):
    with pytest.raises(script.RowError, match="does not name a file inside"):
        script.find_image(tmp_path, image_id)


def test_an_image_may_lie_deeper(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "d.png").touch()
    for directory in (tmp_path, script.Path("."), script.Path("x/..")):
        assert script.find_image(directory, "b/c/../d.png") == tmp_path / "b" / "d.png"
