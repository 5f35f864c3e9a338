"""Draw `tests/data`: eight images in eight shapes and modes, and a CSV of questions about them.

    python tests/make_data.py [DIRECTORY]

Wide, tall and square, RGB, grey, palette, RGBA, CMYK and turned by EXIF; rows of one image do not
stand together in the CSV, and its texts are those that naive readers of CSVs destroy.
"""

import csv
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SHAPES = [
    ("circle.png", "RGB", (320, 320), "red"),
    ("wide.jpg", "RGB", (640, 120), "blue"),
    ("tall.jpeg", "RGB", (90, 500), "green"),
    ("grey.png", "L", (200, 160), "white"),
    ("palette.png", "P", (160, 200), "yellow"),
    ("clear.png", "RGBA", (240, 240), "teal"),
    ("print.jpg", "CMYK", (256, 192), "brown"),
    ("turned.jpg", "RGB", (300, 150), "gray"),
]
QUESTIONS = [
    ("what color is the shape?", "{color}"),
    ("is there a circle in the image?", "None"),
    ("how many shapes\nare there,\nand where?", "007"),
]
EXTRA = [  # question_id, image, question, answer
    ("long", "wide.jpg", "which of the shapes in this image " * 40 + "is red?", "NA"),
    ("кириллица/日本", "circle.png", "図形は何色ですか？ Какого цвета фигура? 🙂", "赤"),
    ("..", "tall.jpeg", "one?", "nan"),
    ("50%/a", "grey.png", "  what is this?  ", ""),
]


def draw(name: str, mode: str, size: tuple[int, int], color: str, directory: Path) -> None:
    """One ellipse and one bar, so that no two orientations look alike."""
    image = Image.new("RGB", size, "black")
    width, height = size
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((width // 8, height // 8, width // 2, height // 2), fill=color)
    canvas.rectangle((width // 2, height // 2, width - 5, height * 3 // 4), fill="white")
    exif = Image.Exif()
    if name == "turned.jpg":
        exif[0x0112] = 6  # orientation: turn by 90 degrees to show
    image.convert(mode).save(directory / name, exif=exif)


def main(directory: Path) -> None:
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for shape in SHAPES:
        draw(*shape, directory / "images")
    rows = [
        (f"{number:03d}", name, question, answer.format(color=color))
        for number, (question, answer, name, color) in enumerate(
            (question, answer, name, color)
            for question, answer in QUESTIONS
            for name, _, _, color in SHAPES
        )
    ]
    with open(directory / "vqa.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("question_id", "image_id", "question", "answer"))
        writer.writerows([*rows, *EXTRA])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "data"))
