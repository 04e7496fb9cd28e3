"""The main job, in a small form."""

import html
import json

import pytest
import torch

import retrograd
from retrograd import Classification, open_run
from retrograd.demo import Correlation, load_digits, run_demo, small_network
from retrograd.errors import InputError, RecordExists


@pytest.fixture(scope="module", autouse=True)
def few_test_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrograd.demo.TRAINING_IMAGES", 1700)
        yield


@pytest.fixture(scope="module")
def result(few_test_images, tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo") / "out", epochs=4, subsets=24)


def test_the_exact_adjoint_predicts_retraining(result):
    exact, tracin = result.methods
    assert exact.correlation.low > 0.9
    assert exact.correlation.value > tracin.correlation.value
    assert isinstance(exact.rank_correlation, Correlation)
    assert result.queries == max(result.wrong, 8)


def test_the_predictions_are_checked(result):
    exact, tracin = (method.check for method in result.methods)
    assert exact.predicted.shape == exact.actual.shape == (result.subsets, result.queries)
    assert torch.equal(exact.actual, tracin.actual)
    assert exact.pearson.value == result.methods[0].correlation.value
    assert exact.spearman.value == result.methods[0].rank_correlation.value
    assert 0.8 < exact.slope.value < 1.25
    assert exact.ceilings.keys() == {"additive"}  # the halves come in pairs
    assert exact.pearson.value < exact.ceilings["additive"] + 0.02
    assert not exact.advice
    assert tracin.advice
    page = html.unescape(result.page.read_text(encoding="utf-8"))
    for part in (str(exact), str(tracin), f"could pass r = {exact.ceilings['additive']:.2f}", "What to try", *tracin.advice):
        assert part in page
    assert str(exact).endswith(result.counterfactual)


def test_the_page_and_the_figures_are_there(result):
    folder = result.page.parent
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "plotly.min.js", "results.json", "run"]
    assert result.page.read_text(encoding="utf-8").count("<article ") == result.queries
    figures = json.loads((folder / "results.json").read_text())
    assert figures["methods"][0]["correlation"]["value"] == result.methods[0].correlation.value
    assert figures["methods"][0]["says"] == str(result.methods[0].check)
    assert figures["methods"][1]["advice"] == list(result.methods[1].check.advice)
    assert figures["wrong"] == result.wrong


def test_the_run_can_be_opened(result):
    digits = load_digits(0)
    run = open_run(result.run, small_network(1), digits.examples(digits.training), Classification("margin"))
    margins = run.measurements((digits.inputs[digits.test], digits.labels[digits.test]))
    assert len(run) == result.steps
    assert (margins < 0).sum() >= result.wrong  # a wrong label has a margin below zero


def test_the_network_comes_from_its_seed_and_leaves_the_global_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = small_network(3), small_network(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_few_wrong_images_are_topped_up_and_an_earlier_demo_is_replaced(result, monkeypatch):
    folder = result.page.parent
    monkeypatch.setattr("retrograd.demo.FEWEST_QUERIES", 90)
    (folder / "notes.txt").write_text("mine")
    again = run_demo(folder, epochs=1, subsets=4)
    assert again.queries == 90
    assert "were added, to have 90" in again.page.read_text(encoding="utf-8")
    assert (folder / "notes.txt").read_text() == "mine"
    assert json.loads((folder / "run" / "run.json").read_text())["steps"] == again.steps == 27
    assert not list(folder.glob(".demo-*"))


@pytest.mark.parametrize("name", ["run", "index.html", "results.json"])
def test_what_no_demo_made_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(RecordExists, match="which no demo made"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(RecordExists, match="is a file"):
        run_demo(tmp_path / name)


@pytest.mark.parametrize("subsets", [0, 2, 25])
def test_halves_come_in_pairs(tmp_path, subsets):
    with pytest.raises(InputError, match="complementary pairs"):
        run_demo(tmp_path, subsets=subsets)
    assert not list(tmp_path.iterdir())


def test_a_demo_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text('{"made_by": "retrograd demo"}')

    def fail(*args, **kwargs):
        raise retrograd.errors.NonFinite("no")

    monkeypatch.setattr("retrograd.demo.record", fail)
    with pytest.raises(retrograd.errors.NonFinite):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
