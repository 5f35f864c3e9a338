"""--page: what it holds, and what it does in a real browser, headless Chromium."""

import base64
import collections
import contextlib
import functools
import http.server
import io
import itertools
import json
import re
import shutil
import threading

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import IMAGES, flags, inspect, read_csv, read_samples, write_csv
from make_large_parts import write_parts
from PIL import Image, ImageOps

import inspect_h5

ROWS = [tuple(row.values()) for row in read_csv().values()]
EVIL = [
    (
        "<b>id</b>",
        "circle.png",
        "</script><script>window.broken = 1</script>",
        '<img src=x onerror="window.broken = 2">',
    ),
    ('a "quoted", id', "circle.png", "\u2028'];window.broken = 3//\u2029", "<!--<script>&lt;"),
    ("two\nlines", "wide.jpg", "ما لون الشكل؟", "🙂"),
]
LONG = "a long answer </script> " * 420  # 10,000 characters
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def put_text(file, question_id, name, text):
    """Another text in a sample of an open part."""
    group = next(g for g in file.values() if g.attrs["question_id"] == question_id)
    del group[name]
    group.create_dataset(name, data=text, dtype=h5py.string_dtype())


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A run of the tiny model: 31 samples about 8 images, one answer of 10,000 characters."""
    import run_gemma3_extraction as script

    root = tmp_path_factory.mktemp("page")
    csv_path = write_csv(root / "vqa.csv", [*ROWS, *EVIL])
    with contextlib.redirect_stderr(io.StringIO()):
        assert script.main(flags(root / "output", csv_path=csv_path)) == 0
    for path in (root / "output").glob("*.h5"):
        with h5py.File(path, "r+") as file:
            put_text(file, "001", "answer", LONG)
            put_text(file, "000", "answer", "<script>window.broken = 4</script>red")
    return root / "output"


@pytest.fixture
def copy(output, tmp_path):
    """A copy of the run to change."""
    return shutil.copytree(output, tmp_path / "output")


@pytest.fixture
def write(capsys, tmp_path, output):
    """Write a page of the run; its path."""

    def write_page(*more, paths=output, images_dir=IMAGES, name="page.html"):
        words = (paths, "--page", tmp_path / name, "--images-dir", images_dir, *more)
        status, _, err = inspect(capsys, *words)
        assert status == 0, err
        assert not list(tmp_path.glob("*.partial"))
        return tmp_path / name

    return write_page


def read_page(path):
    """What the page's JSON holds."""
    html = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', html)[1])


def read_uri(uri):
    """The image in a data URI."""
    assert uri.startswith("data:image/jpeg;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@functools.cache
def recognise(uri):
    """The image that a thumbnail is of: the one that is nearest to it, pixel by pixel."""
    thumbnail = read_uri(uri)
    differences = {}
    for path in IMAGES.iterdir():
        with Image.open(path) as source:
            upright = ImageOps.exif_transpose(source).convert("RGB").resize(thumbnail.size)
        pixels = np.asarray(upright, float) - np.asarray(thumbnail, float)
        differences[path.name] = np.abs(pixels).mean()
    assert min(differences.values()) < 5
    return min(differences, key=differences.get)


def by_id(path):
    return {sample["question_id"]: sample for sample in read_page(path)["samples"]}


# Without a browser


def test_each_image_is_in_it_once_upright_and_small(write):
    path = write()
    page = read_page(path)
    assert path.read_text(encoding="utf-8").count("data:image/jpeg") == len(page["images"]) == 8
    for image_id, image in page["images"].items():
        thumbnail = read_uri(image["src"])
        assert max(thumbnail.size) <= 384
        assert recognise(image["src"]) == image_id
    assert read_uri(page["images"]["turned.jpg"]["src"]).size == (150, 300)
    assert read_uri(page["images"]["wide.jpg"]["src"]).size == (384, 72)


def test_it_holds_the_samples_image_by_image(write, output):
    samples = read_samples(output)
    page = read_page(write())["samples"]
    planned = dict.fromkeys(sample["image_id"] for sample in samples.values())
    order = sorted(samples, key=lambda name: list(planned).index(samples[name]["image_id"]))
    assert [sample["question_id"] for sample in page] == order
    for sample in page:
        stored = samples[sample["question_id"]]
        for name in ("image_id", "question", "answer", "ground_truth_answer"):
            assert sample[name] == stored[name]
        assert sample["cut"] == ("ANSWER CUT" if stored["answer_truncated"] else "answer whole")
        expected = [stored["first_token_entropy"], stored["answer_logprobs"].mean()]
        assert list(sample["numbers"].values()) == pytest.approx(expected, abs=1e-3)
    assert len({sample["key"] for sample in page}) == len(page)


def test_no_text_stands_in_it_as_markup(write):
    html = write().read_text(encoding="utf-8")
    assert html.count("<script") == html.count("</script>") == 2
    for text in ("window.broken = 1<", "<img src", "<b>id", "<!--", "\u2028", "\u2029"):
        assert text not in html


def test_its_policy_names_its_script(write):
    import hashlib

    html = write().read_text(encoding="utf-8")
    policy = re.search('content="(default-src[^"]*)"', html)[1]
    script = re.search("<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert not re.search(r"https?:|url\(|@import", html.replace(json.dumps(LONG), ""))


@pytest.mark.parametrize(
    "image_id",
    ["../secret.png", "/etc/hostname", "a/../../secret.png", "..", " ", "gone.png", "no_image.png"],
)
def test_what_is_no_picture_is_a_reason(copy, write, tmp_path, image_id):
    images = shutil.copytree(IMAGES, tmp_path / "inner" / "images")
    shutil.copy(IMAGES / "circle.png", images / ".." / "secret.png")
    (images / "no_image.png").write_bytes(b"text")
    for path in copy.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            put_text(file, "001", "image_id", image_id)
    image = read_page(write(paths=copy, images_dir=images))["images"][image_id]
    expected = "cannot be read as an image" if image_id == "no_image.png" else "is no file inside"
    assert set(image) == {"alt"}
    assert f"{image_id} {expected}" in image["alt"]


def test_it_says_how_many_pictures_are_missing(output, tmp_path, capsys):
    words = (output, "--page", tmp_path / "x.html", "--images-dir", tmp_path)
    assert "31 samples; 8 images, 8 of them missing" in inspect(capsys, *words)[1]


@pytest.mark.parametrize("max_samples", [0, 1, 7, 100, 500, 989, 990, 991])
def test_max_samples_takes_whole_images_spread_over_the_plan(monkeypatch, max_samples):
    sizes = {f"{number}.jpg": number % 10 + 1 for number in range(180)}  # 990 samples
    ids = [image_id for image_id, size in sizes.items() for _ in range(size)]
    ids[700], ids[3] = ids[3], ids[700]  # a row that was taken up later
    samples = list(range(len(ids)))
    monkeypatch.setattr(inspect_h5, "each", lambda samples, *_: iter(ids))
    chosen = inspect_h5.choose_images(samples, max_samples)
    assert len(set(chosen)) == len(chosen) <= max(max_samples, 1)
    assert len(chosen) >= min(max_samples, 990) - 10
    found = [ids[place] for place in chosen]
    assert all(found.count(image_id) == sizes[image_id] for image_id in found)
    assert len(list(itertools.groupby(found))) == len(set(found))  # image by image
    counts = np.histogram(chosen, 10, (0, 990))[0]  # each tenth has its share, to an image
    assert np.abs(counts - len(chosen) / 10).max() <= 10


def test_question_ids_are_those_asked_for(write):
    page = read_page(write("--question-id", "50%/a", "--question-id", "003"))
    assert {sample["question_id"] for sample in page["samples"]} == {"50%/a", "003"}
    assert list(page["images"]) == ["grey.png"]


def test_labels_begin_as_the_rule_or_a_csv_says(write, output, tmp_path):
    assert {sample["start"] for sample in by_id(write()).values()} == {""}
    table, _ = inspect_h5.load_embeddings(output, "vision_representation")
    by_rule = by_id(write("--label", "answer_is_wrong"))
    assert by_rule["000"]["start"] == "right"  # "… red" is there, after a script
    assert by_rule["001"]["start"] == "wrong"
    rows = [(name, mark, 0.5, "no number") for name, mark in zip(table["question_id"], "0110 " * 7)]
    csv_path = write_csv(tmp_path / "l.csv", rows, ("question_id", "mark", "probability", "note"))
    path = write("--label", f"{csv_path}:mark")
    words = {"0": "right", "1": "wrong", " ": ""}
    for name, mark, *_ in rows:
        assert by_id(path)[name]["start"] == words[mark]
        assert by_id(path)[name]["numbers"]["probability (CSV)"] == 0.5
        assert "note (CSV)" not in by_id(path)[name]["numbers"]
    assert "right, wrong: 0, 1" in read_page(path)["about"]


@pytest.mark.parametrize("word", ["right", "wrong", "0"])
def test_labels_of_one_kind_keep_their_meaning(write, tmp_path, word):
    csv_path = write_csv(tmp_path / "l.csv", [("000", word)], ("question_id", "label"))
    sample = by_id(write("--label", f"{csv_path}:label"))["000"]
    assert sample["start"] == ("wrong" if word == "wrong" else "right")


def test_ids_that_look_missing_and_empty_numbers(write, copy, tmp_path):
    for path in copy.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            for old, new in (("000", "NA"), ("001", "nan")):
                file.move(old, new)
                file[new].attrs["question_id"] = new
    rows = [("NA", "1", "0.25"), ("nan", "0", "")]
    csv_path = write_csv(tmp_path / "l.csv", rows, ("question_id", "mark", "probability"))
    csv_path.write_bytes(b"\xef\xbb\xbf" + csv_path.read_bytes())
    samples = by_id(write("--label", f"{csv_path}:mark", paths=copy))
    assert (samples["NA"]["start"], samples["nan"]["start"]) == ("wrong", "right")
    assert samples["NA"]["numbers"]["probability (CSV)"] == 0.25
    assert samples["nan"]["numbers"]["probability (CSV)"] is None


def test_a_run_without_answers(tmp_path, capsys):
    write_parts(tmp_path / "output", 20, [0])
    for path in (tmp_path / "output").glob("*.h5"):
        with h5py.File(path, "r+") as file:
            file.attrs["max_new_tokens"] = 0
            for group in file.values():
                del group["answer_logprobs"], group.attrs["first_token_entropy"]
    words = (tmp_path / "output", "--page", tmp_path / "x.html", "--images-dir", tmp_path)
    assert inspect(capsys, *words)[0] == 0
    numbers = read_page(tmp_path / "x.html")["samples"][0]["numbers"]
    assert list(numbers.values()) == [None, None]


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (("--page", "x.html"), 2, "--images-dir"),
        (("--page", "x.png", "--images-dir", "."), 2, ".html"),
        (("--page", "x.html", "--images-dir", ".", "--label", "wrong"), 2, "CSV:COLUMN"),
        (("--page", "x.html", "--images-dir", ".", "--layer", "4"), 2, "does not go with page"),
        (("--images-dir", "."), 2, "does not go with view"),
        (("--page", "x.html", "--images-dir", ".", "--question-id", "0"), 1, "near it"),
        (("--page", "x.html", "--images-dir", ".", "--label", "no.csv:a"), 1, "no.csv"),
        (("--page", "gone/x.html", "--images-dir", "."), 1, "gone/x.html"),
    ],
)
def test_wrong_usage_is_one_line(output, capsys, more, status, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, out, err = inspect(capsys, output, *more)
    assert (found, out) == (status, "")
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


# In a browser


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """Where the browser puts files."""
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory, downloads):
    """One headless Chromium for all tests."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: see requirements")
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            pytest.skip(f"no {program}: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    profile = tmp_path_factory.mktemp("profile")
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={profile}", "--window-size=1200,900"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class Reader:
    """A person before the page."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path):
        """Open the page from the disk as for the first time; nothing may complain."""
        self.driver.get(path.as_uri())
        self.driver.execute_script("localStorage.clear()")
        self.reload()
        return self

    def reload(self):
        self.driver.refresh()
        assert self.driver.get_log("browser") == []

    def run(self, script, *args):
        return self.driver.execute_script(script, *args)

    def press(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def cards(self):
        """What each card shows, in order: texts, the facts below, label, the picture beside."""
        return self.run("""return [...document.querySelectorAll("article")].map((card) => ({
            texts: [...card.querySelectorAll("dd")].map((text) => text.textContent),
            facts: card.querySelector("small").textContent,
            pressed: [...card.querySelectorAll("[aria-pressed=true]")].map((one) => one.value),
            image: card.closest("section").querySelector("img").src,
            has_focus: card.matches(":focus-within"),
        }))""")

    def ids(self):
        return [card["facts"].partition(" · ")[0] for card in self.cards()]

    def labels(self):
        """Labels by question_id, without what has none."""
        cards = self.cards()
        assert max(len(card["pressed"]) for card in cards) <= 1
        names = self.ids()
        return {name: card["pressed"][0] for name, card in zip(names, cards) if card["pressed"]}

    def click(self, question_id, label):
        place = self.ids().index(question_id)
        card = self.driver.find_elements("css selector", "article")[place]
        self.run("arguments[0].scrollIntoView()", card)  # not under the footer
        card.find_element("css selector", f"[value={label}]").click()

    def choose(self, box, text):
        from selenium.webdriver.support.ui import Select

        Select(self.find(box)).select_by_visible_text(text)

    def count(self):
        return self.find("output").text


@pytest.fixture
def reader(chromium):
    return Reader(chromium)


def test_it_shows_the_right_picture_beside_the_right_question(reader, write, output):
    samples = read_samples(output)
    cards = reader.open(write()).cards()
    names = reader.ids()
    assert sorted(names) == sorted(samples)
    for name, card in zip(names, cards):
        sample = samples[name]
        texts = [sample["question"], sample["ground_truth_answer"], sample["answer"]]
        assert card["texts"] == texts
        assert recognise(card["image"]) == sample["image_id"]
        assert f" · {sample['image_id']} · " in card["facts"]
    assert reader.run("return document.querySelectorAll('section').length") == 8
    drawn = "return [...document.images].every((image) => image.complete && image.naturalWidth)"
    assert reader.run(drawn)
    header = reader.find("header").text
    assert re.search("vqa.csv, .*tiny_gemma3, [0-9a-f]{64}", header)
    assert "31 samples; 8 images" in header
    assert reader.count() == "31 of 31 shown, 0 labelled"


def test_labels_by_click_and_by_key_are_kept_over_a_reload(reader, write):
    reader.open(write())
    names = reader.ids()
    assert [card["has_focus"] for card in reader.cards()] == [True] + [False] * 30
    reader.press("1", "j", "2", "\ue015", "3", "j", "j", "\ue013", "2")  # down … up
    expected = {names[0]: "right", names[1]: "wrong", names[2]: "unclear", names[3]: "wrong"}
    assert reader.labels() == expected
    reader.click(names[10], "right")
    reader.press("j", "1", "k", "k", "2")
    expected |= {names[10]: "right", names[11]: "right", names[9]: "wrong"}
    assert reader.labels() == expected
    assert reader.count() == "31 of 31 shown, 7 labelled"
    reader.reload()
    assert reader.labels() == expected
    reader.click(names[10], "unclear")
    assert reader.labels() == expected | {names[10]: "unclear"}


def test_labels_belong_to_a_run_and_to_an_answer(reader, write, copy, tmp_path):
    reader.open(write())
    reader.press("1", "j", "2")
    labels = reader.labels()
    reader.driver.get(write(name="again.html", paths=copy).as_uri())  # the same run, written anew
    assert reader.labels() == labels
    reader.driver.get(write("--label", "answer_is_wrong", name="other.html").as_uri())
    reader.choose("#show", "changed")
    assert reader.ids() == []
    for path in copy.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            put_text(file, "000", "answer", "another answer")
    reader.driver.get(write(name="again.html", paths=copy).as_uri())
    assert reader.labels() == {name: labels[name] for name in labels if name != "000"}
    for path in copy.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            file.attrs["model_revision"] = "another"
    reader.driver.get(write(name="again.html", paths=copy).as_uri())
    assert reader.labels() == {}


def test_what_is_downloaded_is_what_probe_reads(reader, write, output, downloads, capsys):
    reader.open(write("--label", "answer_is_wrong"))
    before = reader.labels()
    names = reader.ids()
    for key in "12" * 12 + "3":
        reader.press(key, "j")
    labels = reader.labels()
    assert labels == before | dict(zip(names, ["right", "wrong"] * 12 + ["unclear"]))
    reader.find("#search").send_keys("circle")  # the file has all, whatever is shown
    reader.find("#download").click()
    path = downloads / "labels.csv"
    for _ in range(100):
        if path.exists():
            break
        threading.Event().wait(0.1)
    found = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert list(found) == ["question_id", "label"]
    assert list(found["question_id"]) == names
    words = {name: label.replace("unclear", "") for name, label in labels.items()}
    assert list(found["label"]) == [words.get(name, "") for name in names]
    status, out, err = inspect(capsys, output, "--probe", f"{path}:label", "--json", "--layer", "4")
    assert status == 0, err
    counts = collections.Counter(filter(None, found["label"]))
    assert json.loads(out)["classes"] == {name: counts[name] for name in ("right", "wrong")}
    again = by_id(write("--label", f"{path}:label", name="again.html"))
    assert {name: sample["start"] for name, sample in again.items()} == dict(
        zip(found["question_id"], found["label"])
    )
    path.unlink()


def test_it_shows_what_is_looked_for(reader, write, output):
    samples = read_samples(output)
    reader.open(write("--label", "answer_is_wrong"))
    names = reader.ids()
    start = reader.labels()
    reader.press("3")
    reader.click(names[1], "right" if start[names[1]] == "wrong" else "wrong")
    labels = reader.labels()
    for show in ("right", "wrong", "unclear"):
        reader.choose("#show", show)
        assert reader.ids() == [name for name in names if labels.get(name) == show]
        assert reader.count() == f"{len(reader.ids())} of 31 shown, {len(labels)} labelled"
    reader.choose("#show", "unlabelled")
    assert reader.ids() == [name for name in names if name not in labels]
    reader.choose("#show", "changed")
    assert reader.ids() == names[:2]
    reader.choose("#show", "all")
    reader.find("#search").send_keys("CIRCLE in the")
    assert reader.ids() == [n for n in names if "circle in the" in samples[n]["question"]]
    reader.find("#search").clear()
    reader.find("#search").send_keys("j123k")  # and keys are letters there
    assert (reader.ids(), reader.count()) == ([], f"0 of 31 shown, {len(labels)} labelled")
    reader.find("#search").clear()
    reader.find("#search").send_keys("circle in the")
    reader.find("article [value=unclear]").click()  # at once, though the search box loses the focus
    assert reader.labels()[reader.ids()[0]] == "unclear"
    reader.run("find('#search').value = ''; draw()")
    assert reader.labels() == labels | {"008": "unclear"}


def test_it_sorts(reader, write, output, tmp_path):
    samples = read_samples(output)
    rows = [
        (name, place % 2, "" if place == 5 else place * 7 % 31)
        for place, name in enumerate(samples)
    ]
    path = write_csv(tmp_path / "l.csv", rows, ("question_id", "mark", "first-token entropy"))
    reader.open(write("--label", f"{path}:mark"))
    names = reader.ids()
    entropy = {name: round(float(samples[name]["first_token_entropy"]), 3) for name in names}
    mean = {name: round(float(samples[name]["answer_logprobs"].mean()), 3) for name in names}
    column = {name: float(value) for name, _, value in rows if value != ""}
    for box, values in (
        ("first-token entropy", entropy),
        ("mean log-probability", mean),
        ("first-token entropy (CSV)", column),
    ):
        reader.choose("#sort", box)
        for is_descending in (True, False):
            found = [values[name] for name in reader.ids() if name in values]
            assert found == pytest.approx(sorted(values.values(), reverse=is_descending), abs=2e-3)
            assert reader.ids()[-1] == list(samples)[5] or len(values) == 31
            for name, card in zip(reader.ids(), reader.cards()):  # its picture is beside each
                assert recognise(card["image"]) == samples[name]["image_id"]
            reader.find("#down").click()
    reader.choose("#sort", "as planned")
    assert reader.ids() == names


def test_texts_do_not_break_out(reader, write):
    reader.open(write())
    assert reader.run("return window.broken ?? null") is None
    assert reader.run("return document.querySelectorAll('b, main script, dd *').length") == 0
    reader.find("#search").send_keys("<script>window.broken = 4")
    assert reader.ids() == ["000"]
    dd = reader.find("dd")
    assert reader.run("return getComputedStyle(arguments[0]).direction", dd) == "ltr"
    reader.find("#search").clear()
    reader.find("#search").send_keys("الشكل")
    dd = reader.find("dd")
    assert reader.run("return getComputedStyle(arguments[0]).direction", dd) == "rtl"


def test_no_network_can_be_reached(reader, write):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reader.open(write())
    url = f"http://127.0.0.1:{server.server_port}/"
    blocked = reader.driver.execute_async_script(
        """const [url, done] = arguments;
        const blocked = [];
        addEventListener("securitypolicyviolation", (event) => {
          blocked.push(event.effectiveDirective);
          if (new Set(blocked).size === 3) done([...new Set(blocked)]);
        });
        fetch(url + "fetch").catch(() => {});
        new Image().src = url + "image";
        const script = document.createElement("script");
        script.textContent = "window.broken = 5";
        document.body.append(script);""",
        url,
    )
    server.shutdown()
    server.server_close()
    assert set(blocked) == {"connect-src", "img-src", "script-src-elem"}
    assert reader.run("return window.broken ?? null") is None
    assert asked == []
    reader.driver.get_log("browser")  # which tells of all three


def test_a_missing_picture_is_a_grey_box_with_the_reason(reader, write, tmp_path):
    images = shutil.copytree(IMAGES, tmp_path / "images")
    (images / "circle.png").unlink()
    reader.open(write(images_dir=images))
    image = reader.find("img")
    assert "circle.png is no file inside" in image.get_attribute("alt")
    assert image.size["width"] > 200
    assert image.size["height"] > 80
    color = reader.run("return getComputedStyle(arguments[0]).backgroundColor", image)
    red, green, blue = re.findall(r"\d+", color)[:3]
    assert red == green == blue


@pytest.mark.parametrize("width", [360, 900, 1600])
def test_nothing_is_cut_at_the_sides(reader, write, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    reader.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        reader.open(write("--label", "answer_is_wrong"))
        assert reader.run("return document.documentElement.scrollWidth <= innerWidth")
        place = reader.ids().index("001")
        box = f"document.querySelectorAll('article')[{place}].querySelectorAll('dd')[2]"
        reader.run(f"{box}.scrollIntoView()")
        height, inner = reader.run(f"return [{box}.clientHeight, {box}.scrollHeight]")
        assert height < 300 < inner
        for key in "j" * 20 + "k" * 9:
            reader.press(key)
            threading.Event().wait(0.05)  # no faster than a hand
        top, bottom, floor, right, left, under = reader.run("""
            const marked = document.querySelector("article:focus");
            const card = marked.getBoundingClientRect();
            const image = marked.closest("section").firstChild.getBoundingClientRect();
            const footer = document.querySelector("footer").getBoundingClientRect();
            return [card.top, card.bottom, footer.top, image.right, card.left, image.bottom]""")
        assert 0 <= top < bottom <= floor  # what is marked is under neither footer nor picture
        assert right <= left or under <= top
    finally:
        reader.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_keyboard_is_enough(reader, write):
    reader.open(write())
    reader.run("document.activeElement.blur(); scrollTo(0, 0)")
    reached = []
    reader.run("find('#search').focus()")
    for _ in range(7):
        reached.append(
            reader.run("return document.activeElement.id || document.activeElement.value")
        )
        outline = "return getComputedStyle(document.activeElement).outlineStyle"
        assert reader.run(outline) != "none"
        reader.press("\ue004")
    assert reached == ["search", "show", "sort", "down", "right", "wrong", "unclear"]


def test_a_browser_that_keeps_nothing_says_so(reader, write):
    add = "Page.addScriptToEvaluateOnNewDocument"
    source = "Storage.prototype.setItem = () => { throw new Error('the store is full'); }"
    script = reader.driver.execute_cdp_cmd(add, {"source": source})
    try:
        reader.driver.get(write().as_uri())
        assert "Labels are not kept" in reader.find("header").text
        assert "the store is full" in reader.find("header").text
        assert len(reader.cards()) == 31
    finally:
        reader.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
        reader.driver.get_log("browser")
