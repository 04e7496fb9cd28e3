"""Effects on an outcome: the paired change, its interval, and the retrainings behind it."""

from dataclasses import astuple

import pytest
import torch

from retrograd import Queries, attribute, retrain
from retrograd.errors import InputError, NonFinite
from retrograd.selection import effect, effects
from retrograd.selection.effects import refuse_shared, slopes
from tests.cases import CASES, EXAMPLES, RULES


def table(seed: int, draws: int = 1, seeds: int = 5, queries: int = 60, mean: float = 0.2) -> torch.Tensor:
    """Differences with a part for each draw, seed and query, and a rest."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    parts = 0.2 * normal(draws, 1, 1) if draws > 1 else torch.zeros(1)
    return mean + parts + 0.2 * normal(1, seeds, 1) + normal(1, 1, queries) + 0.3 * normal(draws, seeds, queries)


def test_the_change_is_the_mean_of_paired_differences():
    base, change = table(0, mean=5.0)[0], table(1, draws=3)
    found = effect(base, base + change)
    assert found.outcome == pytest.approx((base + change).mean().item())
    assert found.change == pytest.approx(change.mean().item())
    assert found.low < found.change < found.high
    assert found.seeds == 5
    # What base and outcome have in common takes no part in the interval.
    moved = effect(base * 100, base * 100 + change)
    assert (moved.low, moved.high) == pytest.approx((found.low, found.high))


@pytest.mark.parametrize(("draws", "seeds"), [(1, 1), (1, 5), (4, 5)])
def test_intervals_cover_the_truth(draws, seeds):
    covered = 0
    for number in range(200):
        # One seed is no sample of seeds: the truth is then that seed's own.
        change = table(number, draws, seeds)
        if seeds == 1:
            change = change - change.new_tensor(_seed_part(number))
        found = effect(torch.zeros(seeds, 60, dtype=torch.float64), change, resamples=200, seed=number)
        covered += found.low <= 0.2 <= found.high
    assert 0.88 <= covered / 200 <= 1.0  # 0.95 was asked for; the standard error of 200 trials is 0.015


def _seed_part(seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    return 0.2 * torch.randn(1, 1, 1, generator=generator, dtype=torch.float64).item()


def test_seeds_that_differ_widen_the_interval():
    base = torch.zeros(3, 400)
    same = torch.randn(400, generator=torch.Generator().manual_seed(0)).expand(1, 3, 400)
    apart = same + torch.tensor([-1.0, 0.0, 1.0])[:, None]
    width = [found.high - found.low for found in (effect(base, same), effect(base, apart))]
    assert width[1] > 3 * width[0]


def test_an_effect_is_the_same_each_time():
    base, change = table(0)[0], table(1)
    assert effect(base, change, seed=3) == effect(base, change, seed=3)
    assert effect(base, change, seed=3).low != effect(base, change, seed=4).low


def test_what_has_no_effect_is_refused():
    base, change = table(0)[0], table(1)
    with pytest.raises(InputError, match="shape \\[draw, seed, query\\]"):
        effect(base, change[:0])
    with pytest.raises(InputError, match="resamples"):
        effect(base, change, resamples=1)
    change[0, 2, 7] = torch.nan
    with pytest.raises(NonFinite, match="1 retrainings became non-finite"):
        effect(base, change)


@pytest.mark.parametrize("removal", ["zero_weight", "deletion"])
def test_effects_are_those_of_retraining(removal):
    case = CASES["plain"]
    run = case.record(RULES["momentum"])
    kept = torch.ones(3, EXAMPLES)
    kept[[0, 1, 1, 2, 2], [3, 4, 5, 6, 7]] = 0.0
    found = effects(run, case.queries, {"one": kept[:1], "two": kept[1:]}, removal=removal, repeats=2, seed=5)
    times = 2 if removal == "deletion" else 1
    rows = torch.cat([torch.ones(1, EXAMPLES), kept]).repeat_interleave(times, 0)
    outcomes = retrain(run, Queries(case.queries, of="losses"), rows, removal=removal, seed=5).outcomes.mean(1)
    outcomes = outcomes.view(4, times).mean(1)
    assert list(found) == ["one", "two"]
    assert {one.seeds for one in found.values()} == {times}
    assert found["one"].outcome == pytest.approx(outcomes[1].item(), abs=1e-12)
    assert found["one"].change == pytest.approx((outcomes[1] - outcomes[0]).item(), abs=1e-12)
    assert found["two"].change == pytest.approx((outcomes[2:].mean() - outcomes[0]).item(), abs=1e-12)


def test_fresh_seeds_are_paired_seed_by_seed():
    case = CASES["plain"]
    run = case.record(RULES["momentum"])
    kept = torch.ones(1, EXAMPLES).index_fill(1, torch.tensor([2]), 0.0)
    fresh = {"seeds": [1, 2], "initialise": lambda seed: case.build().double()}
    found = effects(run, case.queries, {"one": kept}, **fresh)["one"]
    values = retrain(run, Queries(case.queries, of="losses"), torch.cat([torch.ones(1, EXAMPLES), kept]), **fresh).values
    assert astuple(found) == pytest.approx(astuple(effect(values[0], values[1:])), abs=1e-12)
    assert found.seeds == 2


def test_slopes_are_by_the_factor_on_the_recorded_weight():
    for name in ("plain", "clipped"):  # the second has recorded weights other than 1
        case = CASES[name]
        run = case.record(RULES["momentum"])
        asked = Queries(case.queries, of="losses", mean=True)
        found = slopes(run, case.queries)
        assert torch.allclose(found, attribute(run, asked, check_roughness=False).values[0] * case.all_weights, rtol=1e-12)
        step = torch.zeros(2, EXAMPLES, dtype=torch.float64)
        step[:, 4] = torch.tensor([1e-5, -1e-5])
        up, down = retrain(run, asked, 1 + step).outcomes[:, 0]
        assert found[4].item() == pytest.approx(((up - down) / 2e-5).item(), rel=1e-5)


def test_shared_examples_are_refused_by_their_contents():
    inputs, labels = torch.arange(4.0)[:, None], torch.tensor([0, 1, 0, 1])
    refuse_shared((inputs[:2], labels[:2]), (inputs[2:], labels[2:]))
    with pytest.raises(InputError, match="1 examples are in both"):
        refuse_shared((inputs[:2], labels[:2]), (inputs[1:], labels[1:]))


def test_repeats_are_counted():
    case = CASES["plain"]
    with pytest.raises(InputError, match="repeats must be at least 1"):
        effects(case.record(RULES["sgd"]), case.queries, {}, repeats=0)
