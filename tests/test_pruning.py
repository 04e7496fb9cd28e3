"""Pruning: what each ranking keeps, what it predicts, and the controls beside what retraining gives."""

from functools import cache

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn

from retrograd import Classification, Examples, Queries, TracIn, Trajectory, attribute, record, retrain, self_influence
from retrograd.errors import InputError
from retrograd.selection import el2n, prune
from retrograd.selection.pruning import stratified_values
from tests.cases import normal

CLASSES = (18, 12, 6)  # examples of each label


def blobs(seed: int, sizes: tuple[int, ...] = CLASSES) -> tuple[Tensor, Tensor]:
    own = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    centres = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64)
    return centres[own] + normal(len(own), 2, seed=seed), own


def model(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@cache
def trained(seed: int = 0, weighted: bool = False) -> Trajectory:
    data = Examples(blobs(1), ids=torch.arange(36) * 3 + 50)
    weights = torch.linspace(0.5, 1.5, 36, dtype=torch.float64) if weighted else None
    return record(
        model(seed),
        data,
        Classification(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5),
        epochs=4,
        batch_size=9,
        seed=seed,
        weights=weights,
    )


@pytest.mark.parametrize("by", ["el2n", "self_influence", "random", "stratified", "outcome", torch.arange(36) % 7])
@pytest.mark.parametrize("keep", [0.25, 0.7, 1.0])
@pytest.mark.filterwarnings("ignore::retrograd.errors.RoughTraining")
def test_the_share_with_the_highest_values_stays(by, keep):
    run = trained()
    found = prune(run, keep, by=by, outcome=blobs(2) if isinstance(by, str) and by == "outcome" else None)
    kept = found.weights == 1
    assert int(kept.sum()) == len(found.kept_ids) == round(36 * keep)
    assert torch.equal(found.example_ids, run.examples.ids)
    assert set(found.weights.tolist()) <= {0.0, 1.0}
    assert set(found.kept_ids.tolist()) == set(found.ranked(round(36 * keep)).tolist())
    assert keep == 1 or found.values[kept].min() >= found.values[~kept].max()
    assert (found.predicted is not None) == (isinstance(by, str) and by == "outcome")
    assert found.verified == {}


def test_el2n_is_the_distance_of_probabilities_from_the_label():
    run, (inputs, own) = trained(), blobs(1)
    norms = []
    for step in (1, 2, 3):  # 5, 10 and 20 % of 16 steps
        there = model(0)
        there.load_state_dict(run.state(step).params)
        exponentials = there(inputs).exp()
        probabilities = exponentials / exponentials.sum(1, keepdim=True)
        norms.append(((probabilities - torch.eye(3, dtype=torch.float64)[own]) ** 2).sum(1).sqrt())
    assert torch.allclose(el2n(run), (norms[0] + norms[1] + norms[2]) / 3, rtol=1e-12)
    assert torch.allclose(el2n(run, [1]), norms[0], rtol=1e-12)
    hard, easy = prune(run, 0.5), prune(run, 0.5, easy=True)
    assert torch.equal(hard.values, el2n(run))
    assert set(hard.kept_ids.tolist()) == set(easy.removed_ids.tolist())
    assert "hard first" in hard.method
    assert "easy first" in easy.method
    several = prune([run, trained(1)], 0.5)
    assert torch.allclose(several.values, (el2n(run) + el2n(trained(1))) / 2)


def test_self_influence_keeps_first_what_needed_itself():
    run = trained()
    scores = self_influence(run, method=TracIn())
    assert scores.max() <= 0
    found = prune(run, 0.25, by="self_influence")
    assert torch.allclose(found.values, -scores)
    assert set(found.kept_ids.tolist()) == set(run.examples.ids[scores.argsort()[:9]].tolist())
    assert prune(run, 0.25, by="self_influence", easy=True).kept_ids.tolist() != found.kept_ids.tolist()
    other = prune(run, 0.25, by="self_influence", method=TracIn(checkpoints=1))
    assert torch.allclose(other.values, -self_influence(run, method=TracIn(checkpoints=1)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.filterwarnings("ignore::retrograd.errors.RoughTraining")
def test_predicted_effect_is_minus_the_scores_of_what_goes(weighted):
    run = trained(weighted=weighted)
    scores = attribute(run, Queries(blobs(2), of="losses", mean=True), check_roughness=False)
    weights = torch.linspace(0.5, 1.5, 36, dtype=torch.float64) if weighted else torch.ones(36, dtype=torch.float64)
    found = prune(run, 0.75, by="outcome", outcome=blobs(2))
    assert torch.allclose(found.values, -(scores.values[0] * weights), rtol=1e-12)
    removed = torch.isin(run.examples.ids, found.removed_ids)
    assert found.predicted == pytest.approx(-(scores.values[0] * weights)[removed].sum().item(), rel=1e-12)
    if not weighted:
        assert found.predicted == pytest.approx(scores.predicted_change(found.removed_ids).item(), rel=1e-12)
    assert found.predicted < prune(run, 0.75, by="random", outcome=blobs(2)).predicted
    # And it is a derivative: a tenth of the removal, by zero weight, changes the loss by a tenth of it.
    factors = 1 - 1e-4 * removed.double()[None]
    base, changed = (
        retrain(run, Queries(blobs(2), of="losses", mean=True), rows, together=1).values.item()
        for rows in (torch.ones_like(factors), factors)
    )
    assert (changed - base) / 1e-4 == pytest.approx(found.predicted, rel=1e-2)


@pytest.mark.parametrize("keep", [0.1, 1 / 6, 0.5, 0.7, 0.95])
def test_stratified_keeps_the_same_share_of_each_label(keep):
    run, own = trained(), blobs(1)[1]
    found = prune(run, keep, by="stratified", seed=3)
    counts = torch.bincount(own[found.weights == 1], minlength=3)
    assert counts.sum() == round(36 * keep)
    assert (counts - keep * torch.tensor(CLASSES)).abs().max() <= 1
    if keep in (1 / 6, 0.5):
        assert counts.tolist() == [round(size * keep) for size in CLASSES]
    smaller = prune(run, keep / 2, by="stratified", seed=3)
    assert set(smaller.kept_ids.tolist()) <= set(found.kept_ids.tolist())


@pytest.mark.parametrize("by", ["random", "stratified"])
def test_random_rankings_are_those_of_their_seed(by):
    run = trained()
    first, again, other = (prune(run, 0.5, by=by, seed=seed).kept_ids.tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert stratified_values(run, 0).unique().numel() <= 36


NAMES = [name + suffix for suffix in ("", " + distillation") for name in ("everything", "selected", "random", "stratified")]


@pytest.mark.parametrize("fresh", [False, True])
def test_verified_has_all_controls_paired_with_everything(fresh):
    run, data = trained(), blobs(5, (6, 5, 4))
    options = {"seeds": [1, 2], "initialise": model} if fresh else {"repeats": 3}
    found = prune(run, 0.25, verify=data, weight=0.8, draws=2, together=16, **options)
    assert list(found.verified) == NAMES
    for name, effect in found.verified.items():
        assert effect.low <= effect.change <= effect.high
        assert effect.seeds == (2 if fresh else 3)
        assert effect.change == pytest.approx(effect.outcome - found.verified["everything"].outcome, abs=1e-12)
        assert (effect.low < effect.high) == (name != "everything")
    everything = found.verified["everything"]
    assert (everything.change, everything.low, everything.high) == (0.0, 0.0, 0.0)
    assert prune(run, 0.25, verify=data, weight=0.8, draws=2, together=16, **options).verified == found.verified
    # The same trainings, one at a time.
    for suffix, weight in (("", None), (" + distillation", 0.8)):
        kept = (found.weights == 1)[None]
        if fresh:
            losses = by_hand(run, data, kept, weight, options)
            assert found.verified["selected" + suffix].outcome == pytest.approx(losses, rel=1e-9)


def by_hand(run: Trajectory, data: tuple, kept: Tensor, weight: float | None, options: dict) -> float:
    """Mean loss after retraining, from the probability of the true label that models of a plain loop have."""
    from retrograd.selection import with_teacher

    asked = Classification("log_probability")
    again = record(
        model(0),
        run.examples,
        asked,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5),
        order=[step.example_ids for step in run.records],
        seed=0,
    )
    student = again if weight is None else with_teacher(again, run, weight=weight)
    # The number of a retraining seeds its shuffles, and the selected subset is number 1.
    rows = torch.cat([torch.ones_like(kept), kept])
    found = retrain(student, data, rows, removal="deletion", hold="steps", together=1, **options)
    return -found.values[1].mean().item()


def test_a_selection_of_everything_changes_nothing_but_the_order():
    run, data = trained(), blobs(5, (3, 3, 3))
    found = prune(run, 1.0, by="random", verify=data, weight=0.0, draws=1, repeats=1, together=8)
    plain, distilled = found.verified["selected"], found.verified["selected + distillation"]
    assert plain.outcome == pytest.approx(distilled.outcome, rel=1e-9)  # weight 0: no teacher
    assert found.verified["random"].seeds == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep is the share of the 36 examples"),
        ({"keep": 1.2}, "keep is the share"),
        ({"keep": 0.01}, "at least one"),
        ({"by": "margin"}, "by must be one of|Type-check"),
        ({"by": torch.ones(5)}, r"shape \(36,\), got shape \(5,\)"),
        ({"by": torch.full((36,), torch.nan)}, "finite value"),
        ({"by": "outcome"}, "give validation data"),
        ({"by": "outcome", "outcome": blobs(2), "verify": blobs(2)}, "are in both the validation data and verify="),
        ({"by": "random", "easy": True}, "easy= turns around"),
        ({"by": torch.ones(36), "easy": True}, "easy= turns around"),
        ({"draws": 0}, "at least 1, got 0 and 4"),
        ({"verify": blobs(2), "seeds": [1]}, "give both seeds"),
    ],
)
def test_refused(options, message):
    with pytest.raises((InputError, TypeCheckError), match=message):
        prune(trained(), **options)


def test_runs_that_are_averaged_have_the_same_examples():
    other = record(model(0), blobs(1), Classification(), optimizer=torch.optim.SGD, epochs=1, batch_size=36)
    with pytest.raises(InputError, match="same examples"):
        prune([trained(), other])
    with pytest.raises(InputError, match="no run"):
        prune([])


def test_random_with_a_teacher_beats_random_on_digits():
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images, own = torch.tensor(loaded.data / 16, dtype=torch.float32), torch.tensor(loaded.target)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    run = record(
        start,
        (images[:300], own[:300]),
        Classification(),
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
        epochs=8,
        batch_size=50,
    )
    found = prune(run, 0.1, verify=(images[600:1000], own[600:1000]), draws=2, repeats=1, together=8)
    verified = found.verified
    assert verified["random"].low > 0  # a sixteenth of the data is too little
    assert verified["random + distillation"].change < 0.6 * verified["random"].change
    assert verified["random + distillation"].high < verified["selected"].low
