"""Retraining against ordinary training: together and one after the other, recorded and fresh seeds, weights and deletion."""

from collections import Counter

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn

from retrograd import (
    CheckpointSeries,
    Examples,
    Queries,
    Regression,
    attribute,
    leave_one_out,
    linear_datamodeling_score,
    random_subsets,
    record,
    reporting,
    retrain,
)
from retrograd.errors import InputError, ModelChanged
from retrograd.evaluation.course import Epochs, Protocol
from retrograd.evaluation.program import best_together
from retrograd.evaluation.retrained import Retrained
from retrograd.trajectory import batch_order
from retrograd.trajectory.recorder import step_seed
from tests.cases import CASES, EXAMPLES, QUERIES, RULES, Case

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # as the issue of this part asks


def floats(columns: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(column.to(dtype) if column.is_floating_point() else column for column in columns)


def trained(case: Case, rule: str = "momentum", dtype: torch.dtype = torch.float64, model: nn.Module | None = None, **options):
    """Record a case; ``weights`` and ``order`` may be given in place of its own."""
    chosen = RULES[rule]
    given = {"weights": case.weights, "clip_norm": case.clip_norm, "seed": 3, **options}
    if "order" not in given:
        given |= {"epochs": 2, "batch_size": 4}
    made = (case.model() if model is None else model).to(dtype)
    data = Examples(floats(case.examples, dtype), ids=torch.arange(EXAMPLES) + 100)  # ids are not rows
    return record(made, data, case.task, optimizer=lambda p: chosen.optimizer(p, **chosen.options), **given)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, "momentum") for name in CASES]
    + [(name, rule) for name in ("plain", "batchnorm") for rule in ("dampening", "adam", "rmsprop centered")],
)
def test_together_equals_one_after_the_other(name, rule, dtype):
    case = CASES[name]
    run = trained(case, rule, dtype)
    queries = floats(case.queries, dtype)
    kept = random_subsets(run, 5, 0.5, seed=3)
    together = retrain(run, queries, kept, together=3).outcomes
    single = retrain(run, queries, kept, together=1).outcomes
    for subset, many, one in zip(kept, together, single, strict=True):
        alone = run.rerun(weights=subset.double()).measurements(queries)
        assert torch.allclose(one, alone, atol=1e-14, rtol=0)
        assert torch.allclose(many, alone, atol=TOLERANCE[dtype], rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-4
    everything = retrain(run, queries, torch.ones(1, EXAMPLES, dtype=torch.bool)).outcomes
    assert torch.allclose(everything[0], run.measurements(queries), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("together", [1, 3])
def test_factors_multiply_recorded_weights(together):
    case = CASES["clipped"]
    run = trained(case)
    factors = torch.rand(3, EXAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    found = retrain(run, case.queries, factors, together=together).outcomes
    for row, factor in zip(found, factors, strict=True):
        assert case.weights is not None
        alone = trained(case, weights=case.weights * factor).measurements(case.queries)
        assert torch.allclose(row, alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("name", ["plain", "clipped", "batchnorm", "dropout"])
def test_a_fresh_seed_is_a_recording_with_that_seed(name, together):
    case = CASES[name]
    run = trained(case)

    def initialise(seed: int) -> nn.Module:
        return case.build().double()  # torch's generator is seeded by retrain

    kept = random_subsets(run, 3, 0.5, seed=3)
    found = retrain(run, case.queries, kept, seeds=[7, 8], initialise=initialise, together=together)
    assert found.values.shape == (3, 2, QUERIES)
    assert found.counterfactual.seeds == "fresh"
    for column, seed in enumerate(found.seeds):
        assert seed is not None
        for row, subset in enumerate(kept):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = initialise(seed)
            weights = case.all_weights * subset
            alone = trained(case, model=model, weights=weights, seed=seed).measurements(case.queries)
            assert torch.allclose(found.values[row, column], alone, atol=1e-10, rtol=0)
    assert torch.equal(found.outcomes, found.values.mean(1))
    assert not torch.allclose(found.values[:, 0], found.values[:, 1], atol=1e-3)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("fresh", [None, 9], ids=["recorded", "fresh"])
@pytest.mark.parametrize("name", ["plain", "clipped", "dropout"])
def test_deletion_equals_training_on_the_subset(name, fresh, together):
    case = CASES[name]
    run = trained(case)
    kept = random_subsets(run, 3, 0.5, seed=3)
    options = {} if fresh is None else {"seeds": [fresh], "initialise": lambda seed: case.build().double()}
    found = retrain(run, case.queries, kept, removal="deletion", seed=2, together=together, **options)
    for number, (subset, row) in enumerate(zip(kept, found.outcomes, strict=True)):
        ids = run.examples.ids[subset]
        order = batch_order(Examples(torch.zeros(len(ids)), ids), 2, 4, step_seed(2 if fresh is None else fresh, number))
        model = case.model()
        if fresh is not None:
            with torch.random.fork_rng():
                torch.manual_seed(fresh)
                model = case.build()
        alone = trained(case, order=order, model=model, seed=3 if fresh is None else fresh)
        assert torch.allclose(row, alone.measurements(case.queries), atol=1e-10, rtol=0)


def test_deletion_keeps_epochs_or_steps_and_stretches_the_schedule():
    case = CASES["plain"]
    rates = torch.linspace(0.2, 0.02, 8)
    run = trained(case, learning_rates=rates)
    kept = random_subsets(run, 2, 0.5, seed=1)  # 7 of 14 in batches of 4: 2 steps an epoch in place of 4
    for hold, steps in (("epochs", 4), ("steps", 8)):
        found = retrain(run, case.queries, kept, removal="deletion", hold=hold).outcomes
        for number, (subset, row) in enumerate(zip(kept, found, strict=True)):
            ids = run.examples.ids[subset]
            order = batch_order(Examples(torch.zeros(7), ids), 4, 4, step_seed(0, number))[:steps]
            stretched = rates[torch.arange(steps) * 8 // steps]
            alone = trained(case, order=order, learning_rates=stretched).measurements(case.queries)
            assert torch.allclose(row, alone, atol=1e-10, rtol=0)


def test_subsets_of_different_sizes_are_deleted_side_by_side():
    case = CASES["plain"]
    run = trained(case)
    kept = torch.cat([random_subsets(run, 2, share, seed=1) for share in (0.9, 0.2, 0.5)])[[0, 2, 4, 1, 3, 5]]
    found = retrain(run, case.queries, kept, removal="deletion", together=6).outcomes
    single = retrain(run, case.queries, kept, removal="deletion", together=1).outcomes
    assert torch.allclose(found, single, atol=1e-12, rtol=0)


def test_an_incomplete_last_batch_is_dropped_where_the_run_dropped_it():
    case = CASES["plain"]
    ids = torch.arange(EXAMPLES) + 100
    order = [batch for batch in batch_order(Examples(torch.zeros(EXAMPLES), ids), 3, 4, 0) if len(batch) == 4]
    run = trained(case, order=order)
    assert Epochs.of(run) == Epochs(4, drop_last=True)
    assert [len(batch) for batch in Epochs(4, drop_last=True).order(ids[:7], 3, 0)] == [4, 4, 4]
    assert Epochs(4, drop_last=True).order(ids[:3], 2, 0)[0].sort().values.tolist() == ids[:3].tolist()
    assert Epochs.of(trained(case)) == Epochs(4, drop_last=False)
    assert Epochs.of(trained(case, order=order[:5])) == Epochs(4, drop_last=True)  # stopped in the middle of an epoch


def test_a_run_without_epochs_has_no_other_order():
    case = CASES["plain"]
    run = trained(case, order=torch.tensor([[100, 101], [100, 102], [100, 103]]))
    kept = torch.ones(2, EXAMPLES, dtype=torch.bool)
    assert retrain(run, case.queries, kept).values.shape == (2, 1, QUERIES)
    for options in ({"removal": "deletion"}, {"seeds": [1], "initialise": lambda seed: case.model()}):
        with pytest.raises(InputError, match="did not go through its data in epochs"):
            retrain(run, case.queries, kept, **options)


def test_weights_that_change_have_no_other_order():
    case = CASES["plain"]
    run = trained(case)
    for number, weight in ((0, 1.0), (4, 2.0)):
        weights = torch.full((4,), weight, dtype=torch.float64)
        run.records[number] = type(run.records[number])(**{**vars(run.records[number]), "weights": weights})
    with pytest.raises(InputError, match="changes from step to step"):
        retrain(run, case.queries, torch.ones(1, EXAMPLES, dtype=torch.bool), removal="deletion")


def test_subsets_have_the_size_that_was_asked_for():
    run = trained(CASES["plain"])
    kept = random_subsets(run, 200, 0.5, seed=0)
    assert kept.shape == (200, EXAMPLES)
    assert (kept.sum(1) == 7).all()
    assert 70 < kept.sum(0).min() <= kept.sum(0).max() < 130  # every example stays about half of the time
    assert torch.equal(kept, random_subsets(run, 200, 0.5, seed=0))
    pairs = random_subsets(run, 10, 0.5, seed=0, complementary=True)
    assert torch.equal(pairs[0::2], ~pairs[1::2])
    assert len({tuple(row.tolist()) for row in pairs}) == 10
    with pytest.raises(InputError, match="0 < keep"):
        random_subsets(run, 2, 0.0)
    for count, keep in ((3, 0.5), (2, 0.6)):
        with pytest.raises(InputError, match="complementary"):
            random_subsets(run, count, keep, complementary=True)


def test_leave_one_out():
    case = CASES["plain"]
    run = trained(case)
    assert torch.equal(leave_one_out(run), ~torch.eye(EXAMPLES, dtype=torch.bool))
    some = leave_one_out(run, [103, 101])
    assert [row.tolist().index(False) for row in some] == [3, 1]
    found = retrain(run, case.queries, leave_one_out(run)).outcomes
    alone = run.rerun(weights=(torch.arange(EXAMPLES) != 3).double()).measurements(case.queries)
    assert torch.allclose(found[3], alone, atol=1e-10, rtol=0)
    scores = attribute(run, case.queries, check_roughness=False)
    predicted = torch.stack([scores.predicted_change(removed=[number]) for number in run.examples.ids.tolist()])
    assert torch.allclose(predicted, scores.predicted_subset(leave_one_out(run)))
    assert linear_datamodeling_score(predicted, found, ranks=False).value > 0.9


def test_any_queries_can_be_measured():
    case = CASES["plain"]
    run = trained(case)
    kept = random_subsets(run, 2, 0.5)
    asked = Queries(case.examples, of="losses")
    for together in (1, 2):
        found = retrain(run, asked, kept, together=together)
        assert found.values.shape == (2, 1, EXAMPLES)
        assert (found.values > 0).all()
        assert found.query_ids.tolist() == list(range(EXAMPLES))


def test_a_training_that_explodes_is_told_and_loses_no_other():
    case = CASES["plain"]
    run = trained(case, "sgd")
    factors = torch.ones(3, EXAMPLES, dtype=torch.float64)
    factors[1] = 1e200
    for together in (1, 3):
        with pytest.warns(UserWarning, match="1 of 3 retrainings became non-finite"):
            found = retrain(run, case.queries, factors, together=together).outcomes
        assert found.isfinite().all(1).tolist() == [True, False, True]


def test_progress_counts_every_step():
    case = CASES["plain"]
    run = trained(case)
    seen: Counter = Counter()
    with reporting(lambda phase, done, total: seen.update([(phase, done, total)])):
        retrain(run, case.queries, random_subsets(run, 5, 0.5), together=2)
    assert set(seen) == {("retraining", done, 24) for done in range(25)}


def test_how_many_together_is_bounded_by_memory_and_by_use():
    run = trained(CASES["plain"])
    kept = random_subsets(run, 40, 0.5)
    protocol = Protocol(run, "zero_weight", "epochs", 0)
    assert best_together(protocol, run.state(0), kept, None, memory=1 << 30) in (1, 40)
    assert best_together(protocol, run.state(0), kept[:1], None, memory=1 << 30) == 1
    assert best_together(protocol, run.state(0), kept, None, memory=1) == 1
    assert 1 <= best_together(protocol, run.state(0), kept, None, memory=60_000) < 40


def test_merging_what_was_made_in_different_places():
    case = CASES["plain"]
    run = trained(case)
    kept = random_subsets(run, 4, 0.5)
    make = {"initialise": lambda seed: case.build().double(), "together": 2}
    whole = retrain(run, case.queries, kept, seeds=[1, 2], **make)
    by_subset = [retrain(run, case.queries, part, seeds=[1, 2], **make) for part in kept.split(2)]
    by_seed = [retrain(run, case.queries, kept, seeds=[seed], **make) for seed in (1, 2)]
    for parts in (by_subset, by_seed):
        merged = Retrained.merge(parts)
        assert torch.equal(merged.values, whole.values)
        assert torch.equal(merged.factors, whole.factors)
        assert (merged.seeds, merged.counterfactual) == (whole.seeds, whole.counterfactual)
    for wrong in ([by_seed[0], by_seed[0]], [by_subset[0], by_seed[0]]):
        with pytest.raises(InputError, match="can be merged"):
            Retrained.merge(wrong)
    other = retrain(trained(case, seed=4), case.queries, kept)
    with pytest.raises(InputError, match="trajectory_digest"):
        Retrained.merge([whole, other])
    with pytest.raises(InputError, match="ask different questions"):
        Retrained.merge([retrain(run, case.queries, kept), retrain(run, case.queries, kept, removal="deletion")])
    with pytest.raises(InputError, match="nothing to merge"):
        Retrained.merge([])


def test_bad_arguments():
    case = CASES["plain"]
    run = trained(case)
    kept = torch.ones(2, EXAMPLES, dtype=torch.bool)
    for wrong in (torch.ones(2, 13, dtype=torch.bool), torch.ones(14, dtype=torch.bool), kept[:0]):
        with pytest.raises((InputError, TypeCheckError), match=r"subset"):
            retrain(run, case.queries, wrong)
    with pytest.raises(InputError, match="at least one example"):
        retrain(run, case.queries, ~kept, removal="deletion")
    with pytest.raises(InputError, match="initialise"):
        retrain(run, case.queries, kept, seeds=[1])
    with pytest.raises(InputError, match="distinct"):
        retrain(run, case.queries, kept, seeds=[1, 1], initialise=lambda seed: case.model())
    with pytest.raises(InputError, match="at least 1"):
        retrain(run, case.queries, kept, together=0)
    with pytest.raises(ModelChanged, match="another kind of model"):
        retrain(run, case.queries, kept, seeds=[1], initialise=lambda seed: nn.Linear(3, 3))
    frozen = CASES["groups"]
    with pytest.raises(ModelChanged, match="which is not trained"):
        retrain(frozen.record(RULES["sgd"]), case.queries, kept, seeds=[1], initialise=lambda seed: frozen.build().double())


def test_checkpoints_cannot_be_trained_again():
    case = CASES["plain"]
    series = CheckpointSeries(case.model(), case.examples, case.task, {1: case.model().state_dict()}, learning_rate=0.1)
    with pytest.raises((InputError, TypeCheckError), match="CheckpointSeries"):
        retrain(series, case.queries, torch.ones(1, EXAMPLES, dtype=torch.bool))


def test_score_of_several_runs_is_their_mean():
    case = CASES["plain"]
    first, second = trained(case), trained(case, seed=1)
    both = attribute([first, second], case.queries, check_roughness=False)
    alone = [attribute(run, case.queries, check_roughness=False).values for run in (first, second)]
    assert torch.allclose(both.values, (alone[0] + alone[1]) / 2)
    assert both.notes["runs"] == 2
    assert both.trajectory_digest == f"{first.digest},{second.digest}"


def test_scalar_outputs_still_need_their_axis():
    run = record(
        nn.Linear(2, 1),
        (torch.zeros(4, 2), torch.zeros(4, 1)),
        Regression(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        epochs=1,
        batch_size=2,
    )
    with pytest.raises(InputError, match="outputs of shape"):
        retrain(run, (torch.zeros(3, 2), torch.zeros(3)), torch.ones(1, 4, dtype=torch.bool))
