"""Measures of agreement, what bounds them, and detection: by hand, against scipy and peers, in simulations with known truth."""

import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from retrograd.errors import InputError
from retrograd.evaluation.agreement import calibration, linear_datamodeling_score
from retrograd.evaluation.detection import mislabelled_detection
from retrograd.evaluation.reliability import additive_ceiling, noise_ceiling, one_seed_wall

seeds = st.integers(0, 2**31)


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(seed: int, subsets: int = 12, queries: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    g = draws(seed)
    predicted = torch.randint(-20, 20, (subsets, queries), generator=g).double()  # with ties
    return predicted, predicted + 10 * normal(g, subsets, queries)


# --- agreement ------------------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    predicted = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 4.0]])
    actual = torch.tensor([[5.0, 0.0], [5.0, 3.0], [8.0, 3.0]])
    # Query 0: covariance 3, variance 2. Query 1: centred (-1, -1, 2) and (-2, 1, 1) give 3 and 6.
    found = calibration(predicted, actual)
    assert found.per_query.tolist() == pytest.approx([1.5, 0.5])
    assert found.value == pytest.approx(6 / 8)
    assert found.low < found.value < found.high


def test_calibration_equals_scipy():
    predicted, actual = pair(0, 30)
    slopes = [scipy.stats.linregress(predicted[:, query], actual[:, query])[0] for query in range(4)]
    assert calibration(predicted, actual).per_query.tolist() == pytest.approx(slopes)
    pooled = scipy.stats.linregress((predicted - predicted.mean(0)).flatten(), (actual - actual.mean(0)).flatten())[0]
    assert calibration(predicted, actual).value == pytest.approx(pooled)


@pytest.mark.parametrize("ranks", [True, False])
def test_agreement_equals_scipy(ranks):
    predicted, actual = pair(2, 30)
    measure = scipy.stats.spearmanr if ranks else scipy.stats.pearsonr
    expected = [measure(predicted[:, query], actual[:, query]).statistic for query in range(4)]
    found = linear_datamodeling_score(predicted, actual, ranks=ranks)
    assert found.per_query.tolist() == pytest.approx(expected)
    assert found.value == pytest.approx(sum(expected) / 4)


def test_complementary_subsets_count_as_one_draw():
    """Predictions miss a part of what is linear in the subset, so the second half of a pair tells nothing new."""
    g, covered, covered_apart = draws(3), 0, 0
    for _ in range(100):
        scores, missed = normal(g, 40, 1), normal(g, 40, 1)
        subsets = torch.rand(24, 40, generator=g).argsort(1).argsort(1).lt(20).double() - 0.5
        subsets = torch.stack([subsets, -subsets], dim=1).flatten(0, 1)
        predicted, actual = subsets @ scores, subsets @ (scores + missed)
        left, right = scores - scores.mean(), scores + missed - (scores + missed).mean()  # over all halves
        truth = (left * right).sum() / (left.norm() * right.norm())
        for together in (1, 2):
            found = linear_datamodeling_score(predicted, actual, ranks=False, together=together)
            covered += bool(found.low <= truth <= found.high) * (together == 2)
            covered_apart += bool(found.low <= truth <= found.high) * (together == 1)
    assert covered >= 90
    assert covered_apart < covered
    for together in (0, 5, 48):
        with pytest.raises(InputError, match="at least two lots"):
            calibration(predicted, actual, together=together)


def test_what_does_not_vary_counts_as_zero():
    predicted, actual = pair(1)
    predicted[:, 0] = 0.1
    for measure in (calibration, linear_datamodeling_score):
        assert measure(predicted, actual).per_query[0] == 0
        constant = measure(torch.full_like(predicted, 0.1), actual)
        assert (constant.value, constant.low, constant.high) == (0, 0, 0)


@given(seeds)
def test_ranks_ignore_monotone_transforms(seed):
    predicted, actual = pair(seed)
    before = linear_datamodeling_score(predicted, actual, resamples=10)
    after = linear_datamodeling_score((predicted / 10).exp(), actual**3 + actual, resamples=10)
    assert torch.allclose(before.per_query, after.per_query, atol=1e-12)
    assert (before.low, before.high) == pytest.approx((after.low, after.high))


@given(seeds, st.sampled_from([0.01, 0.5, -3.0, 1e4]))
def test_constants_drop_out_and_slopes_scale_inversely(seed, scale):
    predicted, actual = pair(seed)
    constants = 100 * normal(draws(seed), 4)
    before, after = calibration(predicted, actual), calibration(scale * predicted + constants, actual - constants)
    assert torch.allclose(before.per_query, scale * after.per_query, rtol=1e-7, atol=1e-9)
    assert before.value == pytest.approx(scale * after.value, rel=1e-7, abs=1e-9)
    ends = sorted((scale * after.low, scale * after.high))
    assert ends == pytest.approx([before.low, before.high], rel=1e-6, abs=1e-8)
    pearson = [linear_datamodeling_score(*each, ranks=False) for each in ((predicted, actual), (predicted + constants, actual))]
    assert pearson[0].value == pytest.approx(pearson[1].value)


def test_intervals_hold_the_value_and_repeat():
    predicted, actual = pair(2)
    one, two, other = (calibration(predicted, actual, seed=seed) for seed in (0, 0, 1))
    assert (one.low, one.high) == (two.low, two.high) != (other.low, other.high)
    # Many alike queries, few subsets: Spearman's bias exceeds the sampling error, and the interval is about many subsets.
    g = draws(3)
    predicted = normal(g, 20, 400)
    found = linear_datamodeling_score(predicted, predicted + 0.3 * normal(g, 20, 400))
    assert found.low <= found.value < found.high


@pytest.mark.parametrize("measure", [linear_datamodeling_score, calibration, additive_ceiling])
def test_measures_refuse(measure):
    predicted, actual = pair(0)
    with pytest.raises(InputError, match="at least 3"):
        measure(predicted[:2], actual[:2])
    with pytest.raises(InputError, match="1 query"):
        measure(predicted[:, :0], actual[:, :0])
    with pytest.raises(InputError, match="at least 2 resamples"):
        measure(predicted, actual, resamples=1)
    with pytest.raises(InputError, match="confidence=95"):
        measure(predicted, actual, confidence=95.0)
    actual[3, 1] = math.nan
    with pytest.raises(InputError, match="1 of 48 numbers that are not finite"):
        measure(predicted, actual)


# Six examples, two queries, five subsets of three; all small integers, so that anybody can follow.
SCORES = torch.tensor([[2.0, -1.0, 3.0, 0.0, 1.0, -2.0], [1.0, 4.0, -3.0, 2.0, 0.0, 5.0]])
SUBSETS = torch.tensor([[0, 1, 2], [1, 3, 5], [0, 2, 4], [2, 4, 5], [0, 3, 4]])
ACTUAL = torch.tensor([[3.0, 1.0], [-2.0, 9.0], [7.0, -2.0], [2.0, 1.5], [2.5, 4.0]])
LEAVE_ONE_OUT = torch.tensor([[-1.0, 2.0], [0.5, -4.0], [-2.0, 2.0], [0.2, -1.0], [-1.5, 0.3], [1.0, -6.0]])


def test_peers_agree_on_datamodeling_and_leave_one_out():
    predicted = SCORES[:, SUBSETS].sum(-1).T
    # dattri 0.3.0, dattri.metric.lds, and quanda 0.5.0, LinearDatamodelingMetric (.9873392581939697 for the mean): 1, .9747.
    found = linear_datamodeling_score(predicted, ACTUAL)
    assert found.per_query.tolist() == pytest.approx([1.0, 0.9747], abs=5e-5)
    assert found.value == pytest.approx(0.9873392581939697, abs=1e-6)
    # dattri 0.3.0, dattri.metric.loo_corr, with models in the order of the examples (in any other it is wrong): -.9421, -.8894.
    found = linear_datamodeling_score(SCORES.T, LEAVE_ONE_OUT, ranks=False)
    assert found.per_query.tolist() == pytest.approx([-0.9421, -0.8894], abs=5e-5)


# --- ceilings -------------------------------------------------------------------------------------------------------------

SHARES = {  # share of the variance of one seed's outcome that all seeds have in common, query by query
    "high noise": lambda g, queries: torch.full((queries,), 0.1, dtype=torch.float64),
    "low noise": lambda g, queries: torch.full((queries,), 0.8, dtype=torch.float64),
    "heterogeneous": lambda g, queries: torch.rand(queries, generator=g, dtype=torch.float64),
}


def outcomes(g, subsets: int, seeds: int, queries: int, shares) -> tuple[torch.Tensor, torch.Tensor]:
    """Give what all seeds have in common, related over queries, and the outcomes."""
    common = 0.5 * normal(g, subsets, 1) + math.sqrt(0.75) * normal(g, subsets, queries)
    share = shares(g, queries)
    per_seed = normal(g, seeds, queries)  # a constant over subsets: no part of any ranking
    noise = normal(g, subsets, seeds, queries)
    return common, share.sqrt() * common[:, None] + (1 - share).sqrt() * noise + per_seed


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("count", [2, *(pytest.param(seeds, marks=pytest.mark.slow) for seeds in (3, 5, 10))])
def test_noise_ceiling_is_the_score_of_the_best_prediction_and_the_wall_that_of_one_more_seed(count, shares):
    g, above, beyond = draws(count), [], []
    for _ in range(30):
        best, values = outcomes(g, 100, count + 1, 80, SHARES[shares])
        values, fresh = values[:, :count], values[:, count]
        truth = values.mean(1)
        above.append(noise_ceiling(values, resamples=2).value - linear_datamodeling_score(best, truth, resamples=2).value)
        beyond.append(one_seed_wall(values, resamples=2).value - linear_datamodeling_score(fresh, truth, resamples=2).value)
    assert abs(sum(above) / 30) < 0.01
    assert abs(sum(beyond) / 30) < 0.01


def test_ceilings_of_pure_signal_and_pure_noise():
    g = draws(0)
    signal = normal(g, 40, 1, 5).expand(40, 3, 5) + 10 * normal(g, 3, 5)  # seeds differ by constants only
    for measure in (noise_ceiling, one_seed_wall):
        assert measure(signal).value == pytest.approx(1)
        assert measure(signal).per_query.tolist() == pytest.approx([1] * 5)
        assert measure(normal(g, 200, 4, 100)).value < 0.1
    found = noise_ceiling(normal(g, 50, 3, 1))  # one query: no spread over queries
    assert 0 <= found.low <= found.value <= found.high <= 1


@given(seeds)
def test_ceilings_ignore_scale_and_constants(seed):
    _, values = outcomes(draws(seed), 20, 3, 4, SHARES["low noise"])
    scaled = 1000 * values + 5 * normal(draws(seed), 3, 4)
    for measure in (noise_ceiling, one_seed_wall):
        assert measure(values, resamples=2).value == pytest.approx(measure(scaled, resamples=2).value)


@pytest.mark.parametrize("measure", [noise_ceiling, one_seed_wall])
def test_ceilings_refuse(measure):
    with pytest.raises(InputError, match="retrain every subset with 2 or more"):
        measure(torch.zeros(5, 1, 4))
    with pytest.raises(InputError, match="at least 3 subsets"):
        measure(torch.zeros(2, 2, 4))
    with pytest.raises(InputError, match="not finite"):
        measure(torch.full((5, 2, 4), math.inf))


def test_additive_ceiling_by_hand():
    first, second = torch.tensor([[3.0], [0.0], [1.0]]), torch.tensor([[1.0], [2.0], [3.0]])
    # Odd parts 1, -1, -1: mean square 1. Even parts 2, 1, 2: variance 1/3. Share 3/4.
    assert additive_ceiling(first, second).value == pytest.approx(math.sqrt(0.75))
    swapped = torch.tensor([True, False, True])[:, None]
    exchanged = additive_ceiling(torch.where(swapped, second, first), torch.where(swapped, first, second))
    assert exchanged.value == pytest.approx(math.sqrt(0.75))
    assert additive_ceiling(first, first).value == 0  # the complement does the same: nothing adds up
    assert additive_ceiling(torch.ones(4, 2), torch.ones(4, 2)).value == 0


def halves(g, pairs: int, examples: int) -> torch.Tensor:
    """Give random halves of the examples as ±1: the complement is minus that."""
    order = torch.rand(pairs, examples, generator=g).argsort(1)
    return torch.where(order < examples // 2, 1.0, -1.0).double()


@pytest.mark.parametrize("quadratic", [0.0, 0.3, 1.0, 3.0])
def test_additive_ceiling_is_the_correlation_of_the_linear_part(quadratic):
    g = draws(0)
    kept, queries = halves(g, 400, 30), 30
    linear, products = normal(g, 30, queries), normal(g, 30, 30, queries) / math.sqrt(30)

    def outcome(z):
        return z @ linear + quadratic * torch.einsum("pi,pj,ijq->pq", z, z, products)

    found = additive_ceiling(outcome(kept), outcome(-kept))
    both = torch.cat([kept, -kept])
    best = linear_datamodeling_score(both @ linear, outcome(both), ranks=False, resamples=2).value
    assert found.value == pytest.approx(best, abs=0.01)
    assert found.low <= found.value <= found.high
    if quadratic == 1:  # (1 + ρ) / 2 with ρ between f(S) and -f(Sᶜ)
        rho = linear_datamodeling_score(outcome(kept), -outcome(-kept), ranks=False, resamples=2).per_query
        assert torch.allclose(found.per_query, ((1 + rho) / 2).sqrt(), atol=0.02)
        cubic = additive_ceiling(outcome(kept) + (kept @ linear) ** 3 / 30, outcome(-kept) - (kept @ linear) ** 3 / 30)
        bent = linear_datamodeling_score(both @ linear, outcome(both) + (both @ linear) ** 3 / 30, ranks=False, resamples=2)
        assert cubic.value > bent.value + 0.01  # an upper bound


# --- detection ------------------------------------------------------------------------------------------------------------

SUSPICION = torch.tensor([0.9, 0.1, 0.4, 0.3, 0.8, 0.2, 0.7, 0.05])
FLIPPED = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0]).bool()


def test_peers_agree_on_detection():
    found = mislabelled_detection(SUSPICION, FLIPPED, shares=tuple(k / 8 for k in range(1, 9)))
    # dattri 0.3.0, dattri.metric.mislabel_detection_auc. With ties it depends on the order of the examples.
    assert found.auc.value == pytest.approx(0.8667, abs=5e-5)
    # quanda 0.5.0, MislabelingDetectionMetric, "curve". (Its "score" is the area under this curve, which depends on how many
    # are flipped; it adds 1e-4 times the index to the suspicion, and so another order for scores of that size.)
    curve = [0.3333, 0.6667, 0.6667, 0.6667, 1.0, 1.0, 1.0, 1.0]
    assert [recall.value for recall in found.recall.values()] == pytest.approx(curve, abs=5e-5)
    assert str(found).startswith("AUC 0.867 [")


@given(seeds)
def test_area_equals_sklearn_and_only_order_counts(seed):
    g = draws(seed)
    suspicion = torch.randint(0, 8, (40,), generator=g).double()
    flipped = torch.rand(40, generator=g) < 0.3
    flipped[:2] = torch.tensor([True, False])
    found = mislabelled_detection(suspicion, flipped, resamples=20)
    assert found.auc.value == pytest.approx(roc_auc_score(flipped, suspicion))
    assert found == mislabelled_detection(suspicion.exp() - 3, flipped, resamples=20)
    assert found.auc.value == pytest.approx(1 - mislabelled_detection(-suspicion, flipped, resamples=2).auc.value)
    # Recall among ties is the mean over random orders.
    order = torch.stack([torch.argsort(suspicion + torch.rand(40, generator=g) / 2, descending=True) for _ in range(3000)])
    recall = flipped[order][:, :8].sum(1).double().mean() / flipped.sum()
    assert found.recall[0.2].value == pytest.approx(recall.item(), abs=0.03)


def test_constant_suspicion_is_a_random_order():
    found = mislabelled_detection(torch.ones(37), torch.arange(37) < 5, shares=(0.1, 0.25, 1.0))
    assert found.auc.value == found.auc.chance == found.auc.low == 0.5
    for share, recall in found.recall.items():
        assert recall.value == pytest.approx(share) == pytest.approx(recall.chance)
    assert (found.examples, found.flipped) == (37, 5)


def test_detection_refuses():
    with pytest.raises(InputError, match="0 of 8 examples are flipped"):
        mislabelled_detection(SUSPICION, FLIPPED & False)
    with pytest.raises(InputError, match="8 of 8 examples are flipped"):
        mislabelled_detection(SUSPICION, FLIPPED | True)
    with pytest.raises(InputError, match="NaN for 1"):
        mislabelled_detection(SUSPICION.masked_fill(SUSPICION == 0.9, math.nan), FLIPPED)
    with pytest.raises(InputError, match="shares"):
        mislabelled_detection(SUSPICION, FLIPPED, shares=(10.0,))
    with pytest.raises(InputError, match="resamples"):
        mislabelled_detection(SUSPICION, FLIPPED, resamples=0)


# --- do intervals cover the truth? ------------------------------------------------------------------------------------------


def correlated(g, size: tuple[int, int], middle: float, spread: float, shared: float):
    """Give predictions and outcomes with random queries, which have part of their subsets' effects and noise in common."""
    subsets, queries = size
    rho = torch.tanh(middle + spread * normal(g, queries))
    scale = (0.5 * normal(g, queries)).exp()

    def related() -> torch.Tensor:
        return scale * (math.sqrt(shared) * normal(g, subsets, 1) + math.sqrt(1 - shared) * normal(g, subsets, queries))

    predicted = related()
    return predicted, rho * predicted + (1 - rho**2).sqrt() * related()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(50, 20), (100, 40)], ids=str)
@pytest.mark.parametrize("middle", [0.2, 0.8, 2.0])
@pytest.mark.parametrize("shared", [0.0, 0.3, 0.9])
def test_agreement_covers(size, middle, shared):
    rho = torch.tanh(middle + 0.3 * normal(draws(0), 2_000_000))
    truth = {"rank": (6 / math.pi * (rho / 2).asin()).mean().item(), "pearson": rho.mean().item(), "slope": rho.mean().item()}
    g, covered = draws(1), dict.fromkeys(truth, 0)
    for index in range(100):
        drawn = correlated(g, size, middle, 0.3, shared)
        found = {
            "rank": linear_datamodeling_score(*drawn, resamples=200, seed=index),
            "pearson": linear_datamodeling_score(*drawn, ranks=False, resamples=200, seed=index),
            "slope": calibration(*drawn, resamples=200, seed=index),
        }
        for name, agreement in found.items():
            covered[name] += agreement.low <= truth[name] <= agreement.high
    print("covered", covered)
    assert min(covered.values()) >= 90, covered


@pytest.mark.slow
@pytest.mark.parametrize("size", [(50, 20), (100, 40)], ids=str)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("shares", SHARES)
def test_ceilings_cover(size, count, shares):
    share = SHARES[shares](draws(0), 2_000_000)
    reliability = count * share / (count * share + 1 - share)
    truth = {  # of normal variables
        "noise": (6 / math.pi * (reliability.sqrt() / 2).asin()).mean().item(),
        "one seed": (6 / math.pi * ((reliability * share).sqrt() / 2).asin()).mean().item(),
    }
    g, covered = draws(1), dict.fromkeys(truth, 0)
    for index in range(100):
        _, values = outcomes(g, size[0], count, size[1], SHARES[shares])
        given = {"resamples": 200, "seed": index}
        for name, agreement in (("noise", noise_ceiling(values, **given)), ("one seed", one_seed_wall(values, **given))):
            covered[name] += agreement.low <= truth[name] <= agreement.high
    print("covered", covered)
    assert min(covered.values()) >= 90, covered


@pytest.mark.slow
@pytest.mark.parametrize("apart", [0.5, 1.5])
def test_additive_ceiling_and_detection_cover(apart):
    g, covered = draws(1), {"area": 0, "recall": 0, "additive": 0}
    standard = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    cut = torch.linspace(-5, 7, 100_001, dtype=torch.float64)
    inspected = 0.9 * (1 - standard.cdf(cut)) + 0.1 * (1 - standard.cdf(cut - apart))
    truth = {
        "area": standard.cdf(torch.tensor(apart / math.sqrt(2))).item(),
        "recall": (1 - standard.cdf(cut - apart))[(inspected - 0.2).abs().argmin()].item(),
        "additive": 1 / math.sqrt(1 + apart**2),
    }
    for index in range(100):
        flipped = torch.arange(400) < 40
        found = mislabelled_detection(normal(g, 400) + apart * flipped, flipped, seed=index, resamples=200)
        odd, even = normal(g, 60, 30), apart * normal(g, 60, 30)
        additive = additive_ceiling(odd + even, even - odd, seed=index, resamples=200)
        for name, estimate in (("area", found.auc), ("recall", found.recall[0.2]), ("additive", additive)):
            covered[name] += estimate.low <= truth[name] <= estimate.high
    print("covered", covered)
    assert min(covered.values()) >= 90, covered


@pytest.mark.parametrize("subsets", [6, 16, 24])
def test_few_subsets_that_agree_well_have_a_narrow_interval(subsets):
    """The bias of so few ranks is larger than what is left to 1."""
    g = draws(5)
    predicted = normal(g, subsets, 20)
    found = linear_datamodeling_score(predicted, predicted + 0.1 * normal(g, subsets, 20))
    assert 0.7 < found.low <= found.value < found.high < 1
