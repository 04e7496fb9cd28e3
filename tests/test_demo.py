"""The main job, in a small form."""

import json

import pytest
import torch

import retrograd
from retrograd import Classification, open_run
from retrograd.demo import Correlation, load_digits, run_demo, small_network
from retrograd.errors import RecordExists


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


def test_the_page_and_the_figures_are_there(result):
    folder = result.page.parent
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "plotly.min.js", "results.json", "run"]
    assert result.page.read_text(encoding="utf-8").count("<article ") == result.queries
    figures = json.loads((folder / "results.json").read_text())
    assert figures["methods"][0]["correlation"]["value"] == result.methods[0].correlation.value
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
    again = run_demo(folder, epochs=1, subsets=3)
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


def test_a_demo_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text('{"made_by": "retrograd demo"}')

    def fail(*args, **kwargs):
        raise retrograd.errors.NonFinite("no")

    monkeypatch.setattr("retrograd.demo.record", fail)
    with pytest.raises(retrograd.errors.NonFinite):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
