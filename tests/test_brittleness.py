"""Subset removal and tail patch against training by hand."""

from dataclasses import replace

import pytest
import torch

from retrograd import Scores, attribute, brittleness, tail_patch
from retrograd.errors import InputError
from retrograd.trajectory import StepInputs
from tests.cases import CASES, RULES
from tests.test_self_check import INPUTS, LABELS, QUERIES, trained


@pytest.fixture(scope="module")
def run():
    return trained(rate=0.5)


@pytest.fixture(scope="module")
def scores(run) -> Scores:
    return attribute(run, QUERIES, check_roughness=False)


@pytest.mark.parametrize("removal", ["zero_weight", "deletion"])
def test_removals_equal_training_by_hand(run, scores, removal):
    found = brittleness({"exact": scores, "opposite": replace(scores, values=-scores.values)}, run, [3, 10], removal=removal)
    assert torch.allclose(found.before, run.measurements(QUERIES), atol=1e-10) or removal == "deletion"
    assert found.counts == (3, 10)
    if removal == "zero_weight":
        for query in range(6):
            for place, k in enumerate(found.counts):
                weights = torch.ones(40, dtype=torch.float64)
                weights[[one.example_id for one in scores.top(query, k)]] = 0
                alone = run.rerun(weights=weights).measurements(QUERIES)[query]
                assert torch.allclose(found.after["exact"][place, query], alone, atol=1e-10)
    assert (found.change("exact") < found.change("random") - 0.01).all()
    assert (found.change("opposite") > found.change("random") + 0.01).all()
    assert found.flipped("exact").tolist() == [
        ((found.after["exact"][place] <= 0) & (found.before > 0)).sum().item() / (found.before > 0).sum().item()
        for place in range(2)
    ]
    assert found.flipped("exact")[1] >= found.flipped("random")[1]


def test_bad_removals(run, scores):
    for counts in ([], [0], [40]):
        with pytest.raises(InputError, match="between 1 and 39"):
            brittleness(scores, run, counts)
    with pytest.raises(InputError, match="taken by the control"):
        brittleness({"random": scores}, run)
    with pytest.raises(InputError, match="other queries"):
        brittleness(scores, run, queries=CASES["plain"].queries)
    shuffled = replace(scores, example_ids=scores.example_ids.flip(0))
    with pytest.raises(InputError, match="other queries or examples"):
        brittleness({"exact": scores, "shuffled": shuffled}, run)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_tail_patch_is_one_more_step(name):
    case, rule = CASES["plain"], RULES[name]
    run = case.record(rule)
    scores = attribute(run, case.queries, check_roughness=False)
    found = tail_patch(scores, run, k=3, together=3)
    state, last = run.final_state, run.records[-1]
    hyper = tuple({**own, "step": own["step"] + 1} if "step" in own else own for own in last.hyper)
    for query in range(4):
        ids = torch.tensor([one.example_id for one in scores.top(query, 3)])
        after = run.update_map(state, StepInputs(ids, None, hyper, run.examples.batch(ids), 0))
        expected = run.update_map.measurements(after, case.queries) - run.measurements(case.queries)
        assert torch.allclose(found.change[query], expected[query].detach(), atol=1e-10)
    assert found.change.mean() > found.control.mean()
    doubled = tail_patch(scores, run, k=3, learning_rate=2 * last.hyper[0]["learning_rate"])
    assert not torch.allclose(doubled.change, found.change)


def test_bad_tail_patches(run, scores):
    for k in (0, 41):
        with pytest.raises(InputError, match="between 1 and"):
            tail_patch(scores, run, k)
    with pytest.raises(InputError, match="learning rate of 0"):
        tail_patch(scores, run, learning_rate=0.0)
    assert len(INPUTS) == len(LABELS) == 40
