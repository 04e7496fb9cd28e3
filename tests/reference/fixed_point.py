"""Implicit differentiation of the update map with dense Jacobians of the whole state, taken in plain torch.

    s = Φ(s, u),     Φ = the mean of some recorded steps       λ* = (I − A)⁻ᵀ ∇f,     df/du = Bᵀ λ*

The state is everything: parameters, optimizer slots, buffers. Nothing is eliminated, no symmetry is used.
"""

import torch
from torch import Tensor

from retrograd import Trajectory
from tests.cases import Rule
from tests.reference import hypergradient_autograd as plain
from tests.reference.unrolled_autograd import State
from tests.setups import Setup

_FOREVER = 10**9  # Adam's count of steps, when its corrections of the beginning are over


def final_state(setup: Setup, rule: Rule, run: Trajectory) -> tuple[State, list[str]]:
    """The final state with its frozen parameters, and the names of what moves."""
    tensors, leaves = run.final_state.tensors(), plain.leaves_of(setup, run)
    state = {name: tensors.get(name, leaf).detach().clone() for name, leaf in plain.start(rule, run, leaves).items()}
    return state, sorted(name for name in state if name in tensors)


def mean_step(
    setup: Setup, rule: Rule, run: Trajectory, leaves: plain.Leaves, state: State, steps: range, names: list[str]
) -> Tensor:
    """Φ(s) as one vector, in the order of names."""
    total = torch.zeros(sum(state[name].numel() for name in names), dtype=torch.float64)
    for number in steps:
        new, _ = plain.step(setup, rule, run, leaves, state, number, taken=_FOREVER)
        total = total + torch.cat([new[name].flatten() for name in names]) / len(steps)
    return total


def jacobian(setup: Setup, rule: Rule, run: Trajectory, steps: range) -> Tensor:
    """A = ∂Φ/∂s at the final state."""
    (state, names), leaves = final_state(setup, rule, run), plain.leaves_of(setup, run)

    def flat(vector: Tensor) -> Tensor:
        parts = vector.split([state[name].numel() for name in names])
        own = {**state, **{name: values.view_as(state[name]) for name, values in zip(names, parts, strict=True)}}
        return mean_step(setup, rule, run, leaves, own, steps, names)

    found = torch.autograd.functional.jacobian(flat, torch.cat([state[name].flatten() for name in names]))
    assert isinstance(found, Tensor)
    return found


def hypergradients(setup: Setup, rule: Rule, run: Trajectory, steps: range) -> plain.Leaves:
    """Derivatives of the case's queries by all inputs; those by hyperparameters step by step."""
    A = jacobian(setup, rule, run, steps)
    (state, names), leaves = final_state(setup, rule, run), plain.leaves_of(setup, run)
    own = {name: leaf.clone().requires_grad_() for name, leaf in state.items()}
    rows = []
    for value in plain.ask(setup, own, *setup.case.queries):
        found = torch.autograd.grad(value, [own[name] for name in names], retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(own[name]) if leaf is None else leaf for name, leaf in zip(names, found, strict=True)]
        rows.append(torch.cat([leaf.flatten() for leaf in filled]))
    costates = torch.linalg.solve(torch.eye(len(A), dtype=A.dtype) - A.T, torch.stack(rows).T).T
    return plain.gradients(costates @ mean_step(setup, rule, run, leaves, state, steps, names), leaves)
