"""Flows: a run's states and products as flat vectors are those of the run."""

import math

import pytest
import torch
from torch import Tensor

from retrograd.dynamics import Flow, FunctionFlow, StepFlow, StridedFlow, compose, flow_of, jacobian
from retrograd.errors import InputError, NotRecorded
from tests.cases import CASES, RULES, normal
from tests.tolerances import TOLERANCES


def curve(state: Tensor) -> Tensor:
    return torch.stack([torch.sin(state[0] * state[1]), state[0] ** 2 - state[2], state[1].exp() / 4])


@pytest.mark.parametrize(
    ("case", "rule"), [("plain", "momentum"), ("batchnorm", "adam"), ("clipped", "sgd"), ("dropout", "sgd")]
)
def test_a_run_walks_along_its_own_record(case, rule):
    run = CASES[case].record(RULES[rule])
    flow = StepFlow.of(run)
    assert isinstance(flow, Flow)
    assert flow.steps == len(run)
    state = flow.state(0)
    for step in range(len(run)):
        assert torch.equal(state, flow.flatten(run.state(step)))
        state = flow.advance(step, state)
    final = flow.unflatten(state, len(run))
    assert all(torch.equal(leaf, final.params[name]) for name, leaf in run.final_state.params.items())


@pytest.mark.parametrize(("case", "rule"), [("plain", "momentum"), ("batchnorm", "adam"), ("clipped", "sgd")])
def test_push_pull_and_call_agree(case, rule):
    flow = StepFlow.of(CASES[case].record(RULES[rule]))
    state = flow.state(2)
    tangents, costates = normal(3, flow.dim, seed=0), normal(2, flow.dim, seed=1)
    after, pushed = flow.push(2, state, tangents)
    torch.testing.assert_close(after, flow(2, state), rtol=1e-12, atol=1e-13)
    pulled = flow.pull(2, state, costates)
    torch.testing.assert_close(costates @ pushed.T, pulled @ tangents.T, rtol=0, atol=1e-12 * pushed.norm().item())
    along = torch.func.jvp(lambda own: flow(2, own), (state,), (tangents[0],))[1]
    torch.testing.assert_close(along, pushed[0], rtol=TOLERANCES["exact_vs_autograd"], atol=1e-12)
    back = torch.autograd.functional.vjp(lambda own: flow(2, own), state, costates[0])[1]
    torch.testing.assert_close(back, pulled[0], rtol=TOLERANCES["exact_vs_autograd"], atol=1e-12)


def test_constants_and_counters_are_no_part_of_the_state():
    run = CASES["batchnorm"].record(RULES["sgd"])
    flow, buffers = StepFlow.of(run), {"1.running_mean", "1.running_var"}
    moving = sum(leaf.numel() for name, leaf in run.state(0).buffers.items() if name in buffers)
    assert flow.dim == sum(leaf.numel() for leaf in run.state(0).params.values()) + moving
    state = flow.state(0)
    for step in range(3):
        state = flow.advance(step, state)
    assert int(flow.unflatten(state, 3).buffers["1.num_batches_tracked"]) == 3


def test_functions_take_many_states_at_once():
    flow, states, tangents = FunctionFlow(curve, 3), normal(4, 3, seed=2), normal(4, 2, 3, seed=3)
    after, pushed = flow.push(0, states, tangents)
    pulled = flow.pull(0, states, tangents)
    for row in range(4):
        alone = flow.push(0, states[row], tangents[row])
        torch.testing.assert_close((after[row], pushed[row]), alone, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(pulled[row], flow.pull(0, states[row], tangents[row]), rtol=1e-13, atol=1e-13)


def test_strides_multiply_jacobians():
    flow, state = FunctionFlow(curve, 3), normal(3, seed=4)
    strided, matrix, own = StridedFlow(flow, 3), torch.eye(3, dtype=torch.float64), state
    for step in range(3):
        matrix, own = jacobian(flow, step, own) @ matrix, flow(step, own)
    torch.testing.assert_close(jacobian(strided, 0, state), matrix, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(strided(0, state), compose(flow, state, 3), rtol=0, atol=0)
    costates = normal(2, 3, seed=5)
    torch.testing.assert_close(strided.pull(0, state, costates), costates @ matrix, rtol=1e-12, atol=1e-13)


def test_what_is_no_flow_is_refused():
    run = CASES["plain"].record(RULES["sgd"])
    flow = StepFlow.of(run)
    assert flow_of(flow) is flow
    with pytest.raises(InputError, match="length of a state"):
        flow_of(curve)
    with pytest.raises(InputError, match="StepFlow"):
        flow_of(run.update_map)
    with pytest.raises(InputError, match="got float"):
        flow_of(math.pi)
    with pytest.raises(NotRecorded, match="Steps: 0 to 7"):
        flow.push(8, flow.state(8), normal(1, flow.dim, seed=0))
    with pytest.raises(InputError, match=str(flow.dim)):
        flow.unflatten(torch.zeros(3))
