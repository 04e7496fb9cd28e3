"""Lyapunov exponents: chaotic maps of the literature, linear maps, and recorded training against explicit Jacobians."""

import math

import pytest
import torch
from torch import Tensor

from retrograd.dynamics import (
    FunctionFlow,
    StepFlow,
    exponent_objective,
    finite_time_exponents,
    jacobian,
    lyapunov_exponents,
    top_exponents,
)
from retrograd.errors import InputError, NonFinite
from tests.cases import CASES, RULES, normal
from tests.tolerances import TOLERANCES


def henon(state: Tensor) -> Tensor:
    return torch.stack([1 - 1.4 * state[0] * state[0] + state[1], 0.3 * state[0]])


def lorenz(state: Tensor) -> Tensor:
    """One Runge-Kutta step of 0.01."""

    def slope(at: Tensor) -> Tensor:
        x, y, z = at
        return torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    first = slope(state)
    second = slope(state + 0.005 * first)
    third = slope(state + 0.005 * second)
    return state + 0.01 / 6 * (first + 2 * second + 2 * third + slope(state + 0.01 * third))


def dense_products(flow, state, steps):
    matrices = []
    for step in range(steps):
        matrices.append(torch.func.jacrev(lambda own, step=step: flow(step, own))(state))
        state = flow(step, state)
    return matrices


def test_henon():
    starts = 0.1 * normal(300, 2, seed=0)
    found = lyapunov_exponents(FunctionFlow(henon, 2), starts, 250, discard=30)
    assert found.exponents.shape == (300, 2)
    assert found.exponents[:, 0].mean().item() == pytest.approx(0.4192, abs=0.005)
    assert (found.exponents.sum(1) - math.log(0.3)).abs().max() < 1e-12


def test_lorenz():
    states = 1 + normal(400, 3, seed=1)
    for _ in range(600):
        states = torch.func.vmap(lorenz)(states)
    found = lyapunov_exponents(FunctionFlow(lorenz, 3), states, 250, every=5, discard=150)
    exponents = 100 * found.exponents.mean(0)  # per unit of time
    assert exponents.sum().item() == pytest.approx(-41 / 3, abs=1e-4)
    assert exponents[0].item() == pytest.approx(0.906, abs=0.3)
    assert exponents[1].item() == pytest.approx(0, abs=0.3)


def test_a_linear_map_has_the_logarithms_of_its_eigenvalues():
    basis = normal(4, 4, seed=2)
    matrix = basis @ torch.diag(torch.tensor([2.0, -1.1, 0.5, 0.1], dtype=torch.float64)) @ torch.linalg.inv(basis)
    found = lyapunov_exponents(lambda state: matrix @ state / 2, normal(4, seed=3) * 0, 90, discard=60)
    expected = torch.tensor([1.0, 0.55, 0.25, 0.05], dtype=torch.float64).log()
    torch.testing.assert_close(found.exponents, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.history[-1], found.exponents)
    twice = lyapunov_exponents(lambda state: matrix @ state / 2, torch.zeros(4).double(), 90, discard=60, squared=True)
    torch.testing.assert_close(twice.exponents, 2 * found.exponents)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_exponents_of_a_run_are_those_of_its_jacobians(rule):
    flow = StepFlow.of(CASES["plain"].record(RULES[rule]))
    first = 1 if rule == "adam" else 0  # Adam's square root has no derivative at 0
    state = flow.state(first)
    frame = lyapunov_exponents(flow, state, count=3, step=first, seed=4)
    rows = lyapunov_exponents(flow, state, steps=1, count=3, step=first, seed=4).growth[0]
    generator = torch.Generator().manual_seed(4)
    tangents, total = torch.linalg.qr(torch.randn(3, flow.dim, generator=generator, dtype=torch.float64).T)[0], 0.0
    for step in range(first, len(flow.run)):
        tangents = torch.func.jacrev(lambda own, step=step: flow(step, own))(flow.state(step)) @ tangents
        tangents, upper = torch.linalg.qr(tangents)
        total = total + upper.diagonal().abs().log()
    expected = (total / (len(flow.run) - first)).sort(descending=True).values
    torch.testing.assert_close(frame.exponents, expected, rtol=0, atol=TOLERANCES["exact_vs_autograd"])
    assert rows.shape == (3,)


def test_all_exponents_add_up_to_the_mean_log_determinant():
    flow = StepFlow.of(CASES["plain"].record(RULES["momentum"]))
    found = lyapunov_exponents(flow.run, count=flow.dim)
    logs = [torch.linalg.slogdet(jacobian(flow, step, flow.state(step)))[1] for step in range(len(flow.run))]
    assert found.exponents.sum().item() == pytest.approx(torch.stack(logs).mean().item(), abs=1e-10)
    rare = lyapunov_exponents(flow.run, count=flow.dim, every=3)
    assert rare.lengths.tolist() == [3, 3, 2]
    assert rare.exponents.sum().item() == pytest.approx(found.exponents.sum().item(), abs=1e-10)


@pytest.mark.parametrize("dense", [True, False])
def test_finite_time_exponents_are_singular_values(dense):
    flow = StepFlow.of(CASES["plain"].record(RULES["momentum"]))
    product = torch.linalg.multi_dot(dense_products(flow, flow.state(0), 4)[::-1])
    left, values, right = torch.linalg.svd(product)
    found = finite_time_exponents(flow, None, 4, 2, dense=dense, tolerance=1e-5)
    torch.testing.assert_close(found.exponents, values[:2].log() / 4, rtol=0, atol=1e-12 if dense else 1e-8)
    assert found.residual < (1e-12 if dense else 1e-5)
    assert (found.right * right[:2]).sum(1).abs().min().item() == pytest.approx(1, abs=1e-6)
    assert (found.left * left.T[:2]).sum(1).abs().min().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", ["singular", "frame"])
@pytest.mark.parametrize("squared", [False, True])
def test_exponents_have_gradients(kind, squared):
    def function(state):
        return top_exponents(FunctionFlow(henon, 2), state, 6, 2, kind=kind, squared=squared)

    state = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (state,))
    many = torch.stack([state, state + 0.1, state - 0.3]).detach().requires_grad_()
    assert torch.autograd.gradcheck(function, (many,))
    torch.testing.assert_close(function(many)[0], function(state))


@pytest.mark.parametrize("kind", ["singular", "frame"])
def test_exponents_of_training_have_gradients(kind):
    flow = StepFlow.of(CASES["plain"].record(RULES["momentum"]))
    state = flow.state(0).clone().requires_grad_()
    value = top_exponents(flow, state, 3, kind=kind)
    (slope,) = torch.autograd.grad(value.sum(), state)
    direction = normal(flow.dim, seed=6)
    sides = [top_exponents(flow, (state + sign * 1e-5 * direction).detach(), 3, kind=kind).sum() for sign in (1, -1)]
    assert (slope @ direction).item() == pytest.approx(((sides[0] - sides[1]) / 2e-5).item(), rel=1e-5)


def test_the_step_from_which_it_stays_chaotic():
    rates = [0.5] * 30 + [1.5] * 70
    found = lyapunov_exponents(FunctionFlow(lambda t, s: rates[t] * s, 1, 100, by_step=True), torch.ones(1).double(), every=2)
    assert 24 <= found.chaotic_from(window=5) <= 30
    assert f"from step {found.chaotic_from()}" in str(found)
    calm = lyapunov_exponents(lambda s: s / 2, torch.ones(1).double(), 20)
    assert calm.chaotic_from() is None
    assert "from step" not in str(calm)
    assert calm.amplification.item() == pytest.approx(0.5**20)


def test_objectives_and_refusals():
    values = torch.tensor([[2.0, 1.0, -4.0]])
    assert [exponent_objective(values, name).item() for name in ("max", "min", "sum", "entropy")] == [2, -4, -1, 3]
    with pytest.raises(InputError, match="Give steps"):
        lyapunov_exponents(henon, torch.zeros(2))
    with pytest.raises(InputError, match="only a recorded run"):
        lyapunov_exponents(FunctionFlow(henon, 2), steps=3)
    with pytest.raises(InputError, match="between 1 and 2"):
        lyapunov_exponents(henon, torch.zeros(2), 3, 5)
    with pytest.raises(NonFinite, match="after step"):
        lyapunov_exponents(henon, torch.full((2,), 9.0), 30)
