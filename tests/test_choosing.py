"""A method for a budget, shares of a blend by agreement of runs, and methods side by side."""

import math
from dataclasses import replace

import pytest
import torch

from retrograd import (
    EKFAC,
    Blend,
    CheckpointSeries,
    Classification,
    Counterfactual,
    Implicit,
    Queries,
    Scores,
    Source,
    TracIn,
    Unrolled,
    attribute,
    choose,
    compare,
    coverage,
    random_subsets,
    retrain,
    shares_by_agreement,
)
from retrograd.attribution import choosing
from retrograd.attribution.blending import blended
from retrograd.attribution.choosing import Prices, prices
from retrograd.curvature import DiagonalBlock, KroneckerBlock
from retrograd.errors import InputError
from tests.cases import CASES, RULES

CASE = CASES["plain"]
FRESH = Counterfactual(0.5, "deletion", "fresh")


@pytest.fixture(scope="module")
def run():
    return CASE.record(RULES["momentum"])


@pytest.fixture(scope="module")
def queries():
    return Queries(CASE.queries)


# ---------------------------------------------------------------------------------------------------------------------
# For a budget


@pytest.mark.parametrize(
    ("counterfactual", "budget", "chosen"),
    [
        (Counterfactual(), 200, Unrolled),
        (Counterfactual(), 100, Source),
        (Counterfactual(), 10, Implicit),
        (Counterfactual(), 6, TracIn),
        (Counterfactual(), 3, Implicit),
        (Counterfactual(), 2, TracIn),
        (FRESH, 200, Blend),
        (FRESH, 150, Unrolled),
        (FRESH, 30, Source),
        (FRESH, 20, Implicit),
        (FRESH, 11, TracIn),
    ],
)
def test_the_best_that_a_budget_pays_for(run, queries, monkeypatch, counterfactual, budget, chosen):
    monkeypatch.setattr(choosing, "prices", lambda *_: Prices(training=10.0, sweep=100.0, pass_=1.0 if budget != 6 else 0.9))
    monkeypatch.setattr(choosing, "_FIT", 1.2 if budget != 6 else 9.0)
    found = choose(run, queries, float(budget), counterfactual)
    assert type(found.method) is chosen
    assert found.epochs <= budget
    assert chosen.__name__ in found.why
    dearest = Blend if counterfactual is FRESH else Unrolled
    assert ("Nothing better" in found.more) == (chosen is dearest)


def test_a_budget_that_pays_for_nothing_says_what_would(run, queries, monkeypatch):
    monkeypatch.setattr(choosing, "prices", lambda *_: Prices(training=10.0, sweep=100.0, pass_=1.0))
    with pytest.raises(InputError, match=r"cheapest costs about 11\.0, and 10 of it"):
        choose(run, queries, 5.0, FRESH)


def test_prices_are_measured(run, queries):
    found = prices(run, queries)
    assert found.training == pytest.approx(2.0)  # two epochs
    assert found.sweep > found.training
    assert found.pass_ > 0
    many = Queries(tuple(column.repeat(50, *[1] * (column.dim() - 1)) for column in CASE.queries))
    assert prices(run, many).sweep > found.sweep


def test_auto_says_what_it_took_and_why(run):
    found = attribute(run, CASE.queries, method="auto", budget=1e6)
    assert found.method.startswith("Unrolled(")
    assert "derivative of this very run" in found.notes["why"]
    assert found.notes["expected_epochs"] > 0
    for steps, chosen in ((range(1, 9), "Source("), ((2, 4, 8), "Implicit(")):
        states = {step: run.state(step).params for step in steps}
        series = CheckpointSeries(CASE.model(), CASE.examples, Classification(), states, learning_rate=0.1)
        assert attribute(series, CASE.queries, method="auto", budget=1e6).method.startswith(chosen)
    both = attribute([run, CASE.record(RULES["sgd"])], CASE.queries, method="auto", budget=1e6)
    assert both.method == found.method
    assert (both.notes["runs"], both.notes["why"].split(" for ")[0]) == (2, "Unrolled")
    for wrong in ({"method": "auto"}, {"budget": 3.0}, {"method": TracIn(), "budget": 3.0}):
        with pytest.raises(InputError, match="needs a budget"):
            attribute(run, CASE.queries, **wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Blends of several runs


def noisy(runs, noise, bias, count=20_000):
    """Scores of an exact method (truth + noise of its seed) and of another (truth + bias + less noise)."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda: torch.randn(2, count, generator=draw, dtype=torch.float64)  # noqa: E731
    truth, wrong = normal(), normal()
    ids = (torch.arange(count), torch.arange(2), "some")
    exact = [Scores(3 * (truth + noise * normal()), *ids) for _ in range(runs)]
    other = [Scores(truth + bias * wrong + 0.1 * normal(), *ids) for _ in range(runs)]
    return truth, [exact, other]


@pytest.mark.parametrize("averaged", [1, 2, 4])
@pytest.mark.parametrize(("noise", "bias"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.3)])
def test_shares_are_those_of_the_best_linear_predictor(averaged, noise, bias):
    truth, scores = noisy(4, noise, bias)
    found = shares_by_agreement(scores, runs=averaged)
    # With x = (τ + ε) / s and y = (τ + b) / t independent otherwise: weights ∝ precision, in units of each spread.
    error, other = noise**2 / averaged, bias**2 + 0.01 / averaged
    weights = (math.sqrt(1 + noise**2) / error, math.sqrt(1 + bias**2 + 0.01) / other)
    assert found.shares[0] == pytest.approx(weights[0] / sum(weights), abs=0.03)
    assert sum(found.shares) == pytest.approx(1)
    expected = (1 / math.sqrt(1 + error), 1 / math.sqrt(1 + other), 1 / math.sqrt(1 + 1 / (1 / error + 1 / other)))
    assert found.expected == pytest.approx(expected, abs=0.02)
    assert truth.shape == (2, 20_000)


def test_a_blend_of_runs_finds_its_shares(run):
    runs = [run, CASE.record(RULES["sgd decay"]), CASE.record(RULES["nesterov"])]
    methods = (Unrolled(), Source(2, 1))
    found = attribute(runs, CASE.queries, method=Blend(methods))
    scores = [[attribute(one, CASE.queries, method=method) for one in runs] for method in methods]
    shares = shares_by_agreement(scores).shares
    values = [[own.values for own in each] for each in scores]
    spread = torch.stack([own.std(1, correction=0, keepdim=True) for own in values[0]]).mean(0)
    expected = 0.0
    for share, each in zip(shares, values, strict=True):
        expected = expected + share * sum(own / own.std(1, correction=0, keepdim=True) for own in each) / 3
    assert torch.allclose(found.values, expected * spread, atol=1e-12)
    assert found.notes["runs"] == 3
    assert [float(share) for share in found.notes["shares"].split(",")] == pytest.approx(shares, abs=1e-3)
    assert found.trajectory_digest == ",".join(one.digest for one in runs)
    fixed = attribute(runs, CASE.queries, method=Blend(methods, (0.5, 0.5)))
    assert "shares" not in fixed.notes


def test_rough_runs_get_equal_shares(run):
    runs = [run, CASE.record(RULES["nesterov"])]
    tamed = attribute(runs, CASE.queries, method=Blend((Unrolled(curvature="gauss_newton"), Source(2, 1))))
    assert (tamed.notes["shares"], tamed.notes["expected_correlation"]) == ("0.500, 0.500", None)
    _, scores = noisy(2, noise=1.0, bias=0.2, count=500)
    measured = lambda **notes: [[replace(own, notes=notes) for own in scores[0]], scores[1]]  # noqa: E731
    smooth = blended(measured(curvature="hessian", amplification=1.0), "some").notes["shares"]
    assert smooth != "0.500, 0.500"
    for given in (measured(curvature="hessian", amplification=6.0), measured(curvature="hessian"), scores):
        assert blended(given, "some").notes["shares"] == "0.500, 0.500"


def test_runs_that_say_nothing_about_each_other():
    _, scores = noisy(2, noise=1.0, bias=0.0, count=50)
    draw = torch.Generator().manual_seed(5)
    ids = (torch.arange(50), torch.arange(2), "some")
    first = torch.randn(2, 50, generator=draw, dtype=torch.float64)
    with pytest.raises(InputError, match="agreement tells nothing"):
        shares_by_agreement([[Scores(first, *ids), Scores(-first, *ids)], scores[1]])
    with pytest.raises(InputError, match="two methods and two runs"):
        shares_by_agreement([scores[0]])
    with pytest.raises(InputError, match="two methods and two runs"):
        shares_by_agreement([[scores[0][0]], [scores[1][0]]])


# ---------------------------------------------------------------------------------------------------------------------
# Side by side


def test_methods_side_by_side(run):
    kept = random_subsets(run, 6, 0.5, seed=1)
    truth = retrain(run, CASE.queries, kept)
    methods = {"exact": Unrolled(), "tracin": TracIn(2), "again": Unrolled()}
    found = compare(run, CASE.queries, methods, retrained=truth, check_roughness=False)
    assert torch.allclose(found.agreement, found.agreement.T)
    assert torch.allclose(found.agreement.diagonal(), torch.ones(3, dtype=torch.float64))
    assert found.agreement[0, 2] == pytest.approx(1)
    assert abs(found.agreement[0, 1]) < 1
    assert found.scores["tracin"].counterfactual == truth.counterfactual
    expected = attribute(run, CASE.queries, method=TracIn(2), keep=0.5).values
    assert torch.equal(found.scores["tracin"].values, expected)
    assert all(found.epochs[name] > 0 for name in methods)
    table = str(found)
    assert all(f"{found.checks[name].spearman}" in table for name in methods)
    assert table.count("\n") >= 3
    difference = found.difference("exact", "tracin")
    assert difference.low <= difference.value <= difference.high
    values = [found.checks[name].spearman.value for name in ("exact", "tracin")]
    assert difference.value == pytest.approx(values[0] - values[1])
    assert found.difference("exact", "again").value == 0
    plain = compare([run, run], CASE.queries, [TracIn(1), TracIn(2)])
    assert set(plain.scores) == {repr(TracIn(1)), repr(TracIn(2))}
    assert "LDS" not in str(plain)
    with pytest.raises(InputError, match="no accuracy"):
        plain.difference(*plain.scores)
    with pytest.raises(InputError, match="different names"):
        compare(run, CASE.queries, [TracIn(1), TracIn(1)])
    with pytest.raises(InputError, match="different names"):
        compare(run, CASE.queries, [])


# ---------------------------------------------------------------------------------------------------------------------
# Told before compute


def test_coverage_tells_what_a_method_approximates():
    tied = CASES["tied"].record(RULES["sgd"])
    exact, source = coverage(tied), coverage(tied, Source())
    assert (source.trained, source.tied) == (exact.trained, exact.tied)
    assert not any("Kronecker" in note for note in exact.notes)
    (note,) = [note for note in source.notes if "Kronecker" in note]
    layers = EKFAC().fit(tied, [tied.final_state]).blocks
    kronecker = [block for block in layers if isinstance(block, KroneckerBlock)]
    share = sum(tied.final_state.params[name].numel() for block in kronecker for name in block.names) / exact.trained
    assert f"for {len(kronecker)} layers with {share:.0%} of the parameters" in note
    assert all(block.name in note for block in layers if isinstance(block, DiagonalBlock))
    normed = CASES["batchnorm"].record(RULES["sgd"])
    for method, told in ((Unrolled(), False), (TracIn(), True), (Blend(), True)):
        assert any("evaluation mode" in note for note in coverage(normed, method).notes) is told
    assert "Kronecker" in attribute(normed, CASES["batchnorm"].queries, method=Implicit()).notes["coverage"]
