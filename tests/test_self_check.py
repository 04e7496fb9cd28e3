"""The self-check: predicted against actual, its budget, its ceilings, its advice, and where it is kept."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from retrograd import (
    Check,
    Classification,
    Queries,
    Scores,
    TracIn,
    Unrolled,
    attribute,
    check,
    evaluate,
    leave_one_out,
    linear_datamodeling_score,
    random_subsets,
    record,
    retrain,
)
from retrograd.errors import CorruptRecord, InputError, NonFinite
from retrograd.evaluation import additive_ceiling, calibration, noise_ceiling, one_seed_wall, self_check
from retrograd.evaluation.retrained import Retrained
from tests.cases import CASES

DRAW = torch.Generator().manual_seed(0)
INPUTS = torch.randn(40, 3, generator=DRAW, dtype=torch.float64)
LABELS = (INPUTS[:, 0] + 0.3 * torch.randn(40, generator=DRAW, dtype=torch.float64) > 0).long()
QUERIES = (torch.randn(6, 3, generator=DRAW, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 0, 1]))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def trained(seed: int = 0, rate: float = 0.1, **options):
    torch.manual_seed(seed)
    given = {"epochs": 3, "batch_size": 8, "seed": seed, **options}
    return record(network(), (INPUTS, LABELS), Classification(), optimizer=lambda p: torch.optim.SGD(p, lr=rate), **given)


@pytest.fixture(scope="module")
def run():
    return trained()


@pytest.fixture(scope="module")
def halves(run) -> Scores:
    return attribute(run, QUERIES, keep=0.5, check_roughness=False)


def test_evaluate_gathers_the_measures(run, halves):
    kept = random_subsets(run, 20, 0.5, complementary=True)
    found = evaluate(halves, retrain(run, QUERIES, kept))
    predicted, actual = halves.predicted_subset(kept), retrain(run, QUERIES, kept).outcomes
    assert torch.allclose(found.predicted, predicted)
    assert torch.allclose(found.actual, actual)
    assert found.spearman.value == linear_datamodeling_score(predicted, actual).value
    assert found.pearson.value == linear_datamodeling_score(predicted, actual, ranks=False).value > 0.95
    assert found.slope.value == calibration(predicted, actual).value
    assert 0.8 < found.slope.value < 1.25
    assert found.ceilings == {"additive": additive_ceiling(actual[0::2], actual[1::2]).value}
    assert (found.examples, found.seeds, found.advice) == (40, 1, ())
    assert re.fullmatch(
        r"predicted vs actual r = \d\.\d\d \[\d\.\d\d, \d\.\d\d\] at keeping 50% by weight zero, same seeds", str(found)
    )


def test_fresh_seeds_bring_the_noise_ceiling_and_the_one_seed_wall(run):
    kept = random_subsets(run, 12, 0.5)  # 12 subsets, no pairs
    retrained = retrain(run, QUERIES, kept, seeds=[1, 2, 3], initialise=lambda seed: network())
    found = evaluate(attribute(run, QUERIES, keep=0.5, seeds="fresh", check_roughness=False), retrained)
    assert found.ceilings == {
        "noise": noise_ceiling(retrained.values).value,
        "one seed": one_seed_wall(retrained.values).value,
    }
    assert (found.seeds, found.counterfactual.seeds) == (3, "fresh")


def test_leave_one_out_is_one_of_the_studies(run):
    scores = attribute(run, QUERIES, check_roughness=False)
    found = evaluate(scores, retrain(run, QUERIES, leave_one_out(run)))
    assert found.pearson.value > 0.95
    assert torch.allclose(found.predicted, -scores.values.T)
    assert 0.85 < found.slope.value < 1.15


def test_check_retrains_the_counterfactual_of_the_scores(run, halves):
    checked = check(halves, run, subsets=10)
    assert checked.check is not None
    assert checked.check.actual.shape == (10, 6)
    assert checked.check.counterfactual == replace(halves.counterfactual, keep=0.5)
    assert torch.equal(checked.values, halves.values)
    assert halves.check is None
    small = check(attribute(run, QUERIES, check_roughness=False), run, subsets=10).check
    assert small is not None
    assert small.counterfactual.keep == 0.9
    assert small.pearson.value > 0.9
    deleted = check(attribute(run, QUERIES, keep=0.5, removal="deletion", check_roughness=False), run, subsets=10).check
    assert deleted is not None
    assert deleted.counterfactual.removal == "deletion"
    fresh = attribute(run, QUERIES, keep=0.5, seeds="fresh", check_roughness=False)
    found = check(fresh, run, subsets=4, seeds=[5, 6], initialise=lambda seed: network()).check
    assert found is not None
    assert set(found.ceilings) == {"noise", "one seed"}  # too few subsets for pairs


def test_predictions_have_the_right_size_however_examples_leave(run):
    """What stays after a deletion counts 1 / keep: without that the slope would be twice as large."""
    for removal in ("zero_weight", "deletion"):
        scores = attribute(run, QUERIES, keep=0.5, removal=removal, check_roughness=False)
        found = check(scores, run, subsets=100).check
        assert found is not None
        assert 0.7 < found.slope.value < 1.4


def test_the_budget_is_what_the_scores_cost(run, halves, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(self_check.time, "process_time", lambda: float(next(clock)))  # the first 16 take "one second"
    for seconds, expected in ((0.1, 16), (1.9, 30), (3.0, 48), (1e6, 200)):
        scores = replace(halves, notes={**halves.notes, "seconds": seconds})
        found = check(scores, run).check
        assert found is not None
        assert len(found.actual) == expected
        assert "additive" in found.ceilings
    monkeypatch.undo()
    assert float(halves.notes["seconds"]) > 0


def test_a_check_survives_the_file(run, halves, tmp_path):
    checked = check(halves, run, subsets=10)
    checked.to_parquet(tmp_path / "scores.parquet")
    read = Scores.from_parquet(tmp_path / "scores.parquet")
    assert isinstance(read.check, Check)
    assert checked.check is not None
    assert str(read.check) == str(checked.check)
    for name in ("predicted", "actual"):
        assert torch.equal(getattr(read.check, name), getattr(checked.check, name))
    assert torch.equal(read.check.pearson.per_query, checked.check.pearson.per_query)
    assert (read.check.ceilings, read.check.advice) == (checked.check.ceilings, checked.check.advice)
    halves.to_parquet(tmp_path / "unchecked.parquet")
    assert Scores.from_parquet(tmp_path / "unchecked.parquet").check is None
    with pytest.raises(InputError, match="queries"):
        check(read, run, subsets=4)
    assert check(read, run, subsets=4, queries=QUERIES).check is not None
    whole = (tmp_path / "scores.parquet").read_bytes()
    place = whole.index(b"base64") + 20
    (tmp_path / "scores.parquet").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(CorruptRecord):
        Scores.from_parquet(tmp_path / "scores.parquet")


def test_what_does_not_belong_together_is_refused(run, halves):
    with pytest.raises(InputError, match="another run"):
        check(halves, trained(seed=1), subsets=4)
    matched = run.matching(halves.counterfactual)
    with pytest.raises(InputError, match="another run"):
        check(attribute(matched, QUERIES, check_roughness=False), matched, subsets=4)
    with pytest.raises(InputError, match="at least 3"):
        check(halves, run, subsets=2)
    with pytest.raises(InputError, match="same seeds"):
        check(halves, run, subsets=4, seeds=[1], initialise=lambda seed: network())
    with pytest.raises(InputError, match="fresh seeds"):
        check(attribute(run, QUERIES, keep=0.5, seeds="fresh", check_roughness=False), run, subsets=4)
    with pytest.raises(InputError, match="other queries"):
        check(halves, run, subsets=4, queries=CASES["plain"].queries)
    kept = random_subsets(run, 4, 0.5)
    with pytest.raises(InputError, match="query_ids"):
        evaluate(halves, retrain(run, Queries(QUERIES, mean=True), kept))
    found = retrain(run, QUERIES, kept)
    found.values[1, 0, 2] = torch.nan
    with pytest.raises(NonFinite, match="became non-finite"):
        evaluate(halves, found)


# ---------------------------------------------------------------------- advice


def compared(scores: Scores, actual: torch.Tensor, kept: torch.Tensor, seeds: int = 1) -> Check:
    values = actual[:, None].expand(-1, seeds, -1) + 0.01 * torch.randn(len(actual), seeds, actual.shape[1], generator=DRAW)
    numbers = tuple(range(seeds)) if seeds > 1 else (None,)
    from retrograd.trajectory import Counterfactual

    return evaluate(
        scores,
        Retrained(
            values, kept, numbers, scores.example_ids, scores.query_ids, Counterfactual((kept != 0).double().mean().item())
        ),
    )


def test_advice_names_what_was_measured(run, halves):
    kept = random_subsets(run, 60, 0.5, complementary=True)
    good = halves.predicted_subset(kept)
    noise = torch.randn(60, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * good.std()
    assert compared(halves, good, kept).advice == ()
    (scaled,) = compared(halves, 3 * good, kept).advice
    assert "actual changes are 3 times the predicted" in scaled
    # what no sum of scores can predict: an even function of the subset
    mirrored = noise[torch.arange(60) // 2 * 2]
    assert any("any sum over examples" in one for one in compared(halves, mirrored, kept).advice)
    # an additive outcome that the scores miss: nothing measured says why, or the facts that were measured do
    other = (kept.double() - 1) @ torch.randn(40, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert not any("any sum over examples" in one for one in compared(halves, other, kept).advice)
    facts = {
        "is approximate": attribute(run, QUERIES, method=TracIn(2), keep=0.5, check_roughness=False),
        "Training is rough": replace(halves, notes={**halves.notes, "amplification": 400.0, "metasmoothness": 0.1}),
    }
    for sentence, scores in facts.items():
        assert any(sentence in one for one in compared(scores, other, kept).advice), sentence
    small = attribute(run, QUERIES, check_roughness=False)
    retrained = Retrained(-good[:, None], kept, (None,), small.example_ids, small.query_ids, halves.counterfactual)
    assert any("linearised for small removals" in one for one in evaluate(small, retrained).advice)
    assert "Nothing measured says why" in compared(halves, -good, kept).advice[0]
    (wide,) = compared(halves, other[:6], kept[:6]).advice
    assert "check more subsets than 6" in wide


def test_advice_on_one_seed(run):
    scores = attribute(run, QUERIES, method=Unrolled(), keep=0.5, seeds="fresh", check_roughness=False)
    kept = random_subsets(run, 60, 0.5)
    draw = torch.Generator().manual_seed(3)
    shared = (kept.double() - 1) @ torch.randn(40, 6, generator=draw, dtype=torch.float64)
    own = [(kept.double() - 1) @ torch.randn(40, 6, generator=draw, dtype=torch.float64) for _ in range(8)]
    values = torch.stack([shared + one for one in own], dim=1)
    retrained = Retrained(values, kept, tuple(range(8)), scores.example_ids, scores.query_ids, scores.counterfactual)
    assert any("average several runs" in one for one in evaluate(scores, retrained).advice)
    several = replace(scores, notes={**scores.notes, "runs": 5})
    assert not any("average several runs" in one for one in evaluate(several, retrained).advice)


@pytest.mark.slow
def test_every_leave_one_out_of_a_real_run():
    """1,200 trainings of a digits network, each without one image: the truth that exact scores are derivatives of."""
    from retrograd.demo import load_digits, small_network

    digits = load_digits(0)
    run = record(
        small_network(0),
        digits.examples(digits.training),
        Classification(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        epochs=4,
        batch_size=64,
    )
    queries = digits.examples(digits.test[:20])
    found = evaluate(attribute(run, queries), retrain(run, queries, leave_one_out(run)))
    assert len(found.actual) == 1200
    assert found.pearson.low > 0.97
    assert 0.9 < found.slope.low < found.slope.high < 1.1
