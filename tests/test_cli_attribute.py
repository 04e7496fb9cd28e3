"""``retrograd attribute``: a run of the user's, scored and checked from the command line."""

import json
import math
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import retrograd
from retrograd.cli.attribute import _without_nan
from tests.test_cli import call

SCRIPT = """
import warnings
from dataclasses import dataclass

import torch
from torch import nn

import retrograd
from beside import SEED


@dataclass
class Data:
    inputs: torch.Tensor
    labels: torch.Tensor


def load(rate=0.1, epochs=3):
    torch.manual_seed(SEED)
    data = Data(torch.randn(40, 3), torch.randint(0, 2, (40,)))
    return _trained(data, rate, epochs), (torch.randn(7, 3), torch.arange(7) % 2)


def _trained(data, rate=0.1, epochs=3, **options):
    return retrograd.record(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        (data.inputs, data.labels),
        retrograd.Classification(),
        optimizer=lambda params: torch.optim.SGD(params, lr=rate),
        epochs=epochs,
        batch_size=8,
        **options,
    )


def chatty():
    print("loading")
    return load()


def matched():
    run, queries = load()
    return run.matching(retrograd.Counterfactual(0.5)), queries


def rough():
    return load(rate=30.0, epochs=30)


def fails():
    raise retrograd.errors.InputError("the user's own mistake")


def swapped():
    return load()[::-1]


def three():
    return load() + (1,)


def nothing():
    pass


def no_queries():
    return load()[0], (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def other_warning():
    warnings.warn("of the user", UserWarning)
    return load()


number = 3
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "beside.py").write_text("SEED = 0\n")
    (tmp_path / "my_run.py").write_text(SCRIPT)
    yield tmp_path / "my_run.py"
    sys.modules.pop("beside", None)
    sys.modules.pop("my_run", None)


def scored(script, *options, function="load"):
    result = call("attribute", f"{script}:{function}", "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


def test_attribute_prints_the_strongest_examples(script):
    result = call("attribute", f"{script}:load", "--top", 2)
    assert result.exit_code == 0, result.output
    assert "7 queries, 40 training examples; small removals by weight zero, same seeds" in " ".join(result.stdout.split())
    rows = [line.split() for line in result.stdout.splitlines() if line.count("-0.") and line.count("+0.")]
    assert len(rows) == 10  # of 5 queries
    assert [row[0] for row in rows[::2]] == ["0", "1", "2", "3", "4"]
    assert "first 5 of 7" in result.stdout
    assert "predicted vs actual" not in result.stdout
    top = scored(script, "--top", 2)["top"]
    assert rows[2] == ["1", *_cells(top[1], 0)]
    assert rows[3] == _cells(top[1], 1)


def _cells(top, row):
    both = [top[way][row] for way in ("raising", "lowering")]
    return [text for one in both for text in (str(one["example_id"]), f"{one['score']:+.4g}")]


def test_attribute_checks(script):
    result = call("attribute", f"{script}:load", "--keep", 0.5, "--check", 20)
    assert result.exit_code == 0, result.output
    sentence = r"predicted vs actual r = \S+ \[\S+, \S+\] at keeping 50% by weight zero, same seeds\.\n"
    for pattern in (
        sentence,
        r"Rank correlation \S+ \[\S+, \S+\]; 95% intervals over 20 subsets",
        r"One unit of predicted change went with \S+ \[\S+, \S+\] units",
        r"No sum of one number for each example could pass r = \d\.\d\d\.",
    ):
        assert len(re.findall(pattern, result.stdout)) == 1, result.stdout
    found = scored(script, "--keep", 0.5, "--check", 20)["check"]
    assert f"{found['says']}.\n" in result.stdout
    assert found["subsets"] == 20
    assert found["ceilings"].keys() == {"additive"}
    for name in ("pearson", "spearman", "slope"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert found["pearson"]["value"] > 0.9


def test_a_check_that_fails_prints_advice(script):
    options = ("--method", "tracin", "--checkpoints", 1, "--keep", 0.5, "--check", 20)
    result = call("attribute", f"{script}:rough", *options)
    assert result.exit_code == 0, result.output
    advice = scored(script, *options, function="rough")["check"]["advice"]
    assert advice
    for line in advice:
        assert f"What to try: {line}\n" in result.stdout


def test_a_check_may_choose_how_much_it_costs(script, monkeypatch):
    asked = []

    def check(scores, run, subsets):
        asked.append(subsets)
        return scores

    monkeypatch.setattr("retrograd.check", check)
    for option in (("--check", 0), ("--check", 3), ()):
        assert scored(script, *option)["check"] is None
    assert asked == [None, 3]


@pytest.mark.parametrize(
    ("options", "method", "counterfactual"),
    [
        ((), repr(retrograd.Unrolled()), ["small", "zero_weight"]),
        (("--method", "source"), repr(retrograd.Source()), ["small", "zero_weight"]),
        (("--method", "influence", "--rank", 7), repr(retrograd.Implicit()), ["small", "zero_weight"]),
        (("--method", "blend"), repr(retrograd.Blend()), ["small", "zero_weight"]),
        (("--method", "auto", "--budget", 1e7), repr(retrograd.Unrolled(curvature="auto")), ["small", "zero_weight"]),
        (("--method", "unrolled", "--rank", 3), repr(retrograd.Unrolled(rank=3)), ["small", "zero_weight"]),
        (("--method", "tracin"), repr(retrograd.TracIn()), ["small", "zero_weight"]),
        (("--method", "tracin", "--checkpoints", 2), repr(retrograd.TracIn(checkpoints=2)), ["small", "zero_weight"]),
        (("--keep", 0.25), repr(retrograd.Unrolled()), [0.25, "zero_weight"]),
        (("--keep", 0.5, "--removal", "deletion"), repr(retrograd.Unrolled()), [0.5, "deletion"]),
        (("--removal", "deletion"), repr(retrograd.Unrolled()), ["small", "deletion"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_attribute_options(script, options, method, counterfactual):
    found = scored(script, *options, function="chatty")  # what it prints is not in the JSON
    assert found["method"] == method
    keep, removal = counterfactual
    assert found["counterfactual"] == {"keep": 1.0 if keep == "small" else keep, "removal": removal, "seeds": "same"}
    assert (found["examples"], found["queries"], found["output"]) == (40, list(range(7)), None)
    assert [top["query"] for top in found["top"]] == list(range(7))
    for top in found["top"]:
        raising, lowering = ([one["score"] for one in top[way]] for way in ("raising", "lowering"))
        assert raising == sorted(raising, reverse=True)
        assert lowering == sorted(lowering)
        assert len(raising) == len(lowering) == 5
        assert min(raising) > 0 > max(lowering)
    assert found["notes"]["seconds"] > 0


def test_attribute_says_what_the_library_says(script):
    output = script.with_name("scores.parquet")
    found = scored(script, "--keep", 0.5, "--output", output)
    scores = retrograd.Scores.from_parquet(output)
    ranked = [{"example_id": one.example_id, "score": pytest.approx(one.score)} for one in scores.top(3, 5, lowering=True)]
    assert found["top"][3]["lowering"] == ranked
    assert str(scores.counterfactual) == "keeping 50% by weight zero, same seeds"


def test_scores_are_written_with_their_check_and_replaced(script):
    output = script.parent / "deep" / "scores.parquet"
    assert call("attribute", f"{script}:load", "-o", output).exit_code == 0
    assert retrograd.Scores.from_parquet(output).check is None
    result = call("attribute", f"{script}:load", "-o", output, "--check", 6)
    assert result.exit_code == 0
    assert f"Scores: {output}" in result.stdout
    check = retrograd.Scores.from_parquet(output).check
    assert check is not None
    assert len(check.actual) == 6
    assert str(check) in result.stdout
    assert [path.name for path in output.parent.iterdir()] == ["scores.parquet"]


def test_scores_survive_a_check_that_fails(script, monkeypatch):
    def fail(*args, **kwargs):
        raise retrograd.errors.NonFinite("some retrainings became non-finite")

    monkeypatch.setattr("retrograd.check", fail)
    output = script.with_name("scores.parquet")
    result = call("attribute", f"{script}:load", "-o", output, "--check", 6)
    assert result.exit_code == 1
    assert "non-finite" in result.stderr
    assert retrograd.Scores.from_parquet(output).values.shape == (7, 40)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nothing_here.py:load", (), "there is no file nothing_here.py"),
        ("my_run.py", (), "SOURCE is path/to/script.py:function"),
        ("my_run.py:", (), "SOURCE is path/to/script.py:function"),
        (":load", (), "SOURCE is path/to/script.py:function"),
        ("my_run:two words", (), "SOURCE is path/to/script.py:function"),
        ("my run.txt:load", (), "neither the name of a module nor a file"),
        ("json.py:load", (), "called like a module that is loaded already"),
        ("my_run.py:missing", (), "my_run.py has no function missing. It has: load, chatty, matched, rough,"),
        ("my_run.py:number", (), "has no function number"),
        ("not_there:load", (), "there is no module not_there"),
        ("json.not_there:load", (), "there is no module json.not_there"),
        ("my_run.py:nothing", (), "must return (run, queries), the run a Trajectory or CheckpointSeries; it returned NoneType"),
        ("my_run.py:swapped", (), "it returned (tuple, Trajectory)"),
        (
            "my_run.py:three",
            ("--check", 9),
            "must return (run, queries), the run a Trajectory; it returned (Trajectory, tuple, int)",
        ),
        ("my_run.py:no_queries", (), "there are no queries"),
        ("my_run.py:matched", ("--check", 9), "--check needs a run that was recorded with keep=1"),
        ("my_run.py:load", ("--method", "auto"), "--budget and --method auto belong together"),
        ("my_run.py:load", ("--budget", 9), "--budget and --method auto belong together"),
        ("my_run.py:load", ("--budget", 0.001, "--method", "auto"), "pays for no method"),
        ("my_run.py:load", ("--checkpoints", 3), "--checkpoints is for --method tracin"),
        ("my_run.py:load", ("--checkpoints", 3000, "--method", "tracin"), "checkpoints must be between 1 and"),
        ("my_run.py:load", ("--keep", 1.5), "0 < keep <= 1"),
        ("my_run.py:load", ("--check", 2), "at least 3 subsets"),
        ("my_run.py:load", ("-o", "foreign.parquet"), "is no whole table of scores"),
        ("my_run.py:load", ("-o", "table.parquet"), "is no whole table of scores"),
        ("my_run.py:load", ("-o", "."), "is no whole table of scores"),
        ("my_run.py:load", ("-o", "foreign.parquet/scores.parquet"), "there can be no folder foreign.parquet"),
    ],
)
def test_attribute_errors_are_messages(script, monkeypatch, source, options, message):
    monkeypatch.chdir(script.parent)
    Path("json.py").touch()
    Path("foreign.parquet").write_text("mine")
    pq.write_table(pa.table({"mine": [1, 2]}), "table.parquet")
    before = Path("table.parquet").read_bytes()
    path = list(sys.path)
    result = call("attribute", source, *options)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert "error: " in result.stderr
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert Path("foreign.parquet").read_text() == "mine"
    assert Path("table.parquet").read_bytes() == before
    assert sys.path == path
    assert "my_run" not in sys.modules


@pytest.mark.parametrize(
    "options", [("--method", "guess"), ("--rank", 0), ("--check", -1), ("--top", 0), ("--removal", "burn")]
)
def test_attribute_refuses_options_that_are_not_there(script, options):
    result = call("attribute", f"{script}:load", *options)
    assert result.exit_code == 2
    assert options[0] in result.stderr


def test_errors_of_the_user_keep_their_traceback(script):
    result = call("attribute", f"{script}:fails")
    assert isinstance(result.exception, retrograd.errors.InputError)  # not made a message: where it was raised matters
    assert "my_run.py" in "".join(traceback.format_exception(result.exception))
    script.with_name("broken.py").write_text("import not_there_either\n")
    assert isinstance(call("attribute", f"{script.with_name('broken.py')}:load").exception, ModuleNotFoundError)
    shown = subprocess.run(
        [sys.executable, "-m", "retrograd.cli", "attribute", f"{script}:fails"], capture_output=True, text=True
    )
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr
    assert 'raise retrograd.errors.InputError("the user' in shown.stderr


def test_attribute_takes_a_function_of_a_module(script, monkeypatch):
    (script.parent / "package").mkdir()
    (script.parent / "package" / "__init__.py").touch()
    (script.parent / "package" / "runs.py").write_text("from my_run import load\n")
    monkeypatch.chdir(script.parent)
    try:
        result = call("attribute", "package.runs:load", "--json")
    finally:
        for name in ("package", "package.runs"):
            sys.modules.pop(name, None)
    assert json.loads(result.stdout)["examples"] == 40


def test_rough_training_is_a_short_message(script):
    assert "warning" not in call("attribute", f"{script}:rough", "--method", "tracin").stderr  # it differentiates no step
    result = call("attribute", f"{script}:rough", "--method", "blend")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert "rough: exact derivatives predict little" in line
    assert "RoughTraining" not in result.output
    assert "warning" not in result.stdout
    assert "warning" not in call("attribute", f"{script}:load").stderr


def test_what_auto_took_is_said_and_parts_are_kept(script, tmp_path):
    result = call("attribute", f"{script}:load", "--method", "auto", "--budget", 1e7, "--folder", tmp_path / "parts")
    assert result.exit_code == 0, result.output
    assert "it is the derivative of this very run" in " ".join(result.stdout.split())
    assert "Nothing better is known" in " ".join(result.stdout.split())
    assert (tmp_path / "parts" / "part-0000.parquet").is_file()


def test_warnings_of_others_pass(script):
    with pytest.warns(UserWarning, match="of the user"):
        assert call("attribute", f"{script}:other_warning").exit_code == 0


def test_numbers_that_json_lacks_become_null():
    assert _without_nan({"a": [1.0, math.nan, {"b": -math.inf}], "c": "NaN"}) == {
        "a": [1.0, None, {"b": None}],
        "c": "NaN",
    }
