"""Reading the CSV, planning parts, opening images."""

import csv

import pytest
from conftest import CSV, IMAGES, read_csv
from PIL import Image

import run_gemma3_extraction as script


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_text_survives_to_the_letter():
    rows = script.read_rows(CSV)
    for row, (question_id, expected) in zip(rows, read_csv().items(), strict=True):
        assert row.question_id == question_id
        assert (row.image_id, row.question) == (expected["image_id"], expected["question"])
        assert row.ground_truth == expected["answer"]
    assert {"None", "007", "NA", "nan", ""} <= {row.ground_truth for row in rows}
    assert any("\n" in row.question for row in rows)


def test_aliases_byte_order_mark_order_and_further_columns(tmp_path):
    path = write(
        tmp_path / "a.csv",
        "gt_answer,split,image_name,question_id,question\r\n007,x,a.png,01,why?\r\n",
        "utf-8-sig",
    )
    assert script.read_rows(path) == [script.Row(0, "01", "a.png", "why?", "007")]


def test_a_column_of_our_name_goes_before_its_alias(tmp_path):
    header = "question_id,image_id,image_name,question,answer,gt_answer"
    path = write(tmp_path / "a.csv", f"{header}\n1,right,wrong,why?,right,wrong\n")
    assert script.read_rows(path) == [script.Row(0, "1", "right", "why?", "right")]


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


def test_the_hash_sees_the_four_columns_only(tmp_path):
    rows = script.read_rows(CSV)
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(("more", "question_id", "image_name", "question", "gt_answer"))
        for row in rows:
            writer.writerow(("x", row.question_id, row.image_id, row.question, row.ground_truth))
    assert script.hash_rows(script.read_rows(tmp_path / "a.csv")) == script.hash_rows(rows)
    assert script.hash_rows(rows[:-1]) != script.hash_rows(rows)


def test_images_are_upright_rgb():
    for path in IMAGES.iterdir():
        with Image.open(path) as image:
            width, height = image.size
        found = script.open_image(IMAGES, path.name)
        assert found.mode == "RGB"
        turned = path.name == "turned.jpg"
        assert found.size == ((height, width) if turned else (width, height))
    turned = script.open_image(IMAGES, "turned.jpg")  # lies 300 x 150, the bar below its middle
    assert turned.getpixel((turned.width // 3, 3 * turned.height // 4)) > (200, 200, 200)


@pytest.mark.parametrize(
    "image_id", ["../a.png", "/etc/a.png", "x/../../a.png", "", " ", ".", ".."]
)
def test_no_image_id_leads_out_of_the_directory(tmp_path, image_id):
    with pytest.raises(script.RowError, match="does not name a file inside"):
        script.image_path(tmp_path, image_id)


def test_an_image_may_lie_deeper(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for directory in (tmp_path, script.Path("."), script.Path("x/..")):
        assert script.image_path(directory, "b/c/../d.png") == tmp_path / "b" / "d.png"
