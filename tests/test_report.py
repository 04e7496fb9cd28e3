"""The explorer page: what is on it, that it needs nothing from outside, and that it destroys nothing."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from retrograd import Check, Counterfactual, calibration, linear_datamodeling_score
from retrograd.errors import InputError
from retrograd.report import MethodView, QueryView, RankedImage, write_report
from retrograd.report.png import data_uri, encode_png
from retrograd.report.sentences import ceilings, size_of_changes

EVIL = "<script>alert('&')</script>"
CEILINGS = {"additive": 0.986, "noise": 0.874, "one seed": 0.655}
ADVICE = ("Lower the learning rate (docs/roughness.md).", "The interval is wide: check more subsets than 12.")


def checked(predicted, actual, **changes):
    measures = [linear_datamodeling_score(predicted, actual, ranks=ranks, resamples=20) for ranks in (False, True)]
    slope = calibration(predicted, actual, resamples=20)
    return Check(predicted, actual, *measures, slope, **({"counterfactual": Counterfactual(0.5), "examples": 40} | changes))


def handmade(folder, *, title="Why?", label="3", count=3, subsets=12, ceilings=CEILINGS, advice=ADVICE, **changes):
    generator = torch.Generator().manual_seed(0)

    def image():
        return torch.rand(8, 8, generator=generator)

    actual = torch.randn(subsets, count, generator=generator)
    methods = []
    for name, noise in (("Exact", 0.1), ("TracIn", 2.0)):
        predicted = actual + noise * torch.randn(subsets, count, generator=generator)
        found = checked(predicted, actual, seeds=3, ceilings=ceilings, advice=() if name == "Exact" else advice)
        methods.append(MethodView(name, "in words", 5 + predicted, found))
    views = [
        QueryView(
            100 + number,
            image(),
            label,
            "8",
            -1.5 - number,
            [RankedImage(7, image(), label, 0.25), RankedImage(8, image(), "8", 0.125)],
            [RankedImage(9, image(), "8", -0.5)],
            "A note.",
        )
        for number in range(count)
    ]
    given = {"lede": "A lede.", "facts": {"Roughness": "smooth enough"}, "queries": views, "methods": methods, "actual": actual}
    return write_report(folder, title=title, **(given | changes))


@pytest.mark.parametrize("shape", [(8, 8), (5, 3), (4, 6, 3), (1, 1)])
@pytest.mark.parametrize("floating", [True, False])
def test_png_is_read_back_by_another_program(shape, floating):
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    read = plt.imread(io.BytesIO(encode_png(pixels / 255 if floating else pixels)), format="png")
    np.testing.assert_array_equal((read * 255).round().astype(np.uint8), pixels.numpy())


def test_data_uri_carries_the_png():
    image = torch.eye(3)
    assert base64.b64decode(data_uri(image).removeprefix("data:image/png;base64,")) == encode_png(image)


@pytest.mark.parametrize(
    "image", [torch.zeros(3), torch.zeros(2, 2, 4), torch.zeros(0, 2), torch.zeros(2, 2, dtype=torch.int64)]
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(InputError, match="an image"):
        encode_png(image)


def test_page_shows_everything(tmp_path):
    page = handmade(tmp_path / "deep" / "page")
    text = page.read_text(encoding="utf-8")
    for part in ("Why?", "A lede.", "Roughness", "smooth enough", "A note.", "Query 102", "Exact", "TracIn", "−1.50", "no. 9"):
        assert part in text
    for score in ("+0.250", "+0.125", "−0.500"):
        assert text.count(score) == 3
    assert re.search(r"width: 100.0%", text)  # the bar of the strongest
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert [query["id"] for query in data["queries"]] == [100, 101, 102]
    assert np.shape(data["actual"]) == np.shape(data["methods"][1]["predicted"]) == (3, 12)
    assert sorted(path.name for path in page.parent.iterdir()) == ["index.html", "plotly.min.js"]


class Text(HTMLParser):
    """What a reader sees, in one line."""

    def __init__(self, page):
        super().__init__()
        self.parts, self.hidden = [], False
        self.feed(page.read_text(encoding="utf-8"))
        self.shown = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attrs):
        self.hidden = tag in ("script", "style")

    def handle_data(self, data):
        self.parts += [] if self.hidden else [data]


def test_page_says_what_the_checks_found(tmp_path):
    shown = Text(handmade(tmp_path)).shown
    sentences = re.findall(
        r"predicted vs actual r = (\S+) \[\S+, \S+\] at keeping 50% by weight zero, same seeds\. "
        r"One unit of predicted change went with \S+ \[\S+, \S+\] units of actual change",
        shown,
    )
    assert len(sentences) == 2
    assert float(sentences[0]) > 0.9 > float(sentences[1])
    for sentence in (
        "No sum of one number for each example could pass r = 0.99.",
        "No prediction could pass a rank correlation of 0.87: the truth is a mean over only 3 seeds.",
        "Knowing one seed’s own outcomes exactly would get a rank correlation of 0.66.",
        *ADVICE,
    ):
        assert shown.count(sentence) == 1  # also where both methods have the same ceilings
    assert shown.count("What to try") == 1
    assert shown.index("TracIn") < shown.index("What to try") < shown.index(ADVICE[0]) < shown.index("The best possible")


def test_a_page_without_ceilings_and_advice_has_no_empty_headings(tmp_path):
    shown = Text(handmade(tmp_path, ceilings={}, advice=())).shown
    assert shown.count("predicted vs actual r = ") == 2
    assert "What to try" not in shown
    assert "best possible" not in shown


def test_sentences_come_from_the_figures():
    predicted = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    found = checked(predicted, 0.5 * predicted)
    assert size_of_changes(found.slope).startswith("One unit of predicted change went with 0.5 [0.5, 0.5] units of actual")
    assert ceilings(found) == []


def test_titles_and_labels_are_escaped(tmp_path):
    given = {"title": EVIL, "label": EVIL, "lede": EVIL, "facts": {EVIL: EVIL}, "advice": (EVIL,)}
    text = handmade(tmp_path, **given).read_text(encoding="utf-8")
    assert EVIL not in text
    assert "alert(" in text  # as text


def test_nothing_is_fetched_from_outside(tmp_path):
    addresses = []

    class Addresses(HTMLParser):
        def handle_starttag(self, tag, attrs):
            addresses.extend(value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster"))

    page = handmade(tmp_path)
    text = page.read_text(encoding="utf-8")
    Addresses().feed(text)
    outside = {value for value in addresses if not value.startswith(("#", "data:image/png;"))}
    assert outside == {"plotly.min.js"}
    assert (tmp_path / "plotly.min.js").stat().st_size > 1e6
    assert not re.search(r"https?://|@import|url\(", text)


def test_every_link_has_its_target(tmp_path):
    text = handmade(tmp_path).read_text(encoding="utf-8")
    targets = re.findall(r'\bid="([^"]+)"', text)
    assert len(targets) == len(set(targets))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(targets)


def test_values_that_are_not_finite_do_not_break_the_page(tmp_path):
    actual = torch.full((12, 3), float("nan"))
    text = handmade(tmp_path, actual=actual).read_text(encoding="utf-8")
    assert "NaN" not in re.search(r'id="data">(.*?)</script>', text)[1]


def test_an_earlier_page_is_replaced_and_other_files_stay(tmp_path):
    handmade(tmp_path, title="first")
    (tmp_path / "notes.txt").write_text("mine")
    assert "second" in handmade(tmp_path, title="second").read_text(encoding="utf-8")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["index.html", "plotly.min.js"])
def test_foreign_files_are_not_destroyed(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="not written by retrograd"):
        handmade(tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least one query"):
        handmade(tmp_path / "none", queries=[])
    with pytest.raises(InputError, match=r"must be \[subset, query\]"):
        handmade(tmp_path / "shape", actual=torch.zeros(11, 3))
    ones = torch.rand(12, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match=r"those of its check \(12, 2\)"):
        handmade(tmp_path / "check", methods=[MethodView("Exact", "", torch.zeros(12, 3), checked(ones, ones))])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        handmade(tmp_path / "file")
