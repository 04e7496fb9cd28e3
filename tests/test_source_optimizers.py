"""SOURCE beyond plain SGD: preconditioners, parameter groups, the closed heavy-ball form, stages, averaged parameters."""

import pytest
import torch

from retrograd import EKFAC, KFAC, Classification, Fisher, Source, attribute, record
from retrograd.adjoint.flows import Exponential, HeavyBall
from retrograd.params import flatten, unflatten
from retrograd.trajectory import TrainingState
from tests.cases import CASES, RULES
from tests.reference.dense_curvature import SEED, dense, gradient_rows
from tests.reference.dense_influence import Dense, dense_gauss_newton, example_gradients, query_gradients

CASE = CASES["plain"]


def preconditioner(run, states):
    sizes = []
    for state in states:
        own = {name: torch.as_tensor(run.step_size(state, name)).double() for name in state.params}
        sizes.append(torch.cat([own[name].expand(leaf.shape).flatten() for name, leaf in state.params.items()]))
    return torch.stack(sizes).mean(0)


@pytest.mark.parametrize("rule", ["adam", "adamw", "rmsprop", "groups"])
def test_preconditioned_segments_equal_exponentials_of_their_own_matrix(rule):
    """exp(−c P H) and (1 − exp(−c P H)) (P H)⁻¹ P g with matrices that are not symmetric."""
    case = CASES["groups"] if rule == "groups" else CASE
    run = case.record(RULES["sgd" if rule == "groups" else rule])
    found = attribute(run, case.queries, method=Source(2, 1, Dense())).values
    names = list(run.state(0).params)
    costates, expected = query_gradients(run, case.queries), 0.0
    shrink = 0.1 if rule == "adamw" else 0.0
    for segment in (1, 0):
        state = run.state(2 + 4 * segment)
        matrix = torch.diag(preconditioner(run, [state])) * run.mean_weight @ dense_gauss_newton(run, state)
        matrix = matrix + shrink * torch.eye(len(matrix), dtype=torch.float64)
        product = torch.diag(preconditioner(run, [state]))
        duration = sum(record.hyper[0]["learning_rate"] for record in run.records[4 * segment : 4 * segment + 4])
        nodes = torch.linspace(0, duration, 201, dtype=torch.float64)
        put_in = torch.stack([torch.linalg.matrix_exp(-node * matrix) for node in nodes])
        weights = torch.full((201,), 2.0, dtype=torch.float64)
        weights[1::2], weights[0], weights[-1] = 4, 1, 1  # Simpson's rule
        integral = torch.einsum("n,nij->ij", weights, put_in) * (nodes[1] - nodes[0]) / 3
        expected = expected - costates @ integral @ product @ example_gradients(run, state).T / 14
        costates = costates @ torch.linalg.matrix_exp(-duration * matrix)
    assert names == list(run.update_map.names)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["plain", "cnn", "attention", "tied"])
@pytest.mark.parametrize("method", [EKFAC(), KFAC(), Fisher()], ids=lambda method: type(method).__name__)
def test_scaled_curvatures(name, method):
    """A scale that is a product of rows and columns moves into the factors; any other is measured on the examples."""
    run = CASES[name].record(RULES["sgd"])
    state = run.final_state
    draw = torch.Generator().manual_seed(3)
    scale = {key: 0.5 + torch.rand(leaf.shape, generator=draw, dtype=torch.float64) for key, leaf in state.params.items()}
    found = dense(method.fit(run, [state], seed=SEED, scale=scale), state.params)
    rows = gradient_rows(run, state) * flatten(scale.values())
    fisher = rows.T @ rows / len(rows)
    if isinstance(method, Fisher):
        assert torch.allclose(found, fisher, atol=1e-12)
        return
    plain = dense(method.fit(run, [state], seed=SEED), state.params)
    flat = flatten(scale.values())
    assert (found - fisher).norm() < (plain - fisher).norm()
    if isinstance(method, EKFAC):
        assert torch.allclose(found.trace(), fisher.trace(), rtol=1e-10)
    uniform = {key: torch.full_like(leaf, 0.7) for key, leaf in state.params.items()}
    even = dense(method.fit(run, [state], seed=SEED, scale=uniform), state.params)
    assert torch.allclose(even, 0.49 * plain, atol=1e-12)
    assert flat.min() > 0


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_heavy_ball_equals_its_recursion(momentum, steps):
    curvature = torch.tensor([0.0, 1e-3, 0.1, 1.0, 3.0], dtype=torch.float64)
    flow = HeavyBall(steps, 0.3, momentum)
    for start, force, wanted in ((1.0, 0.0, flow.kept(curvature)), (0.0, 1.0, -flow.put_in(curvature))):
        place, velocity = torch.full_like(curvature, start), torch.zeros_like(curvature)
        for _ in range(steps):
            velocity = momentum * velocity + curvature * place + force
            place = place - 0.3 * velocity
        assert torch.allclose(wanted, place, atol=1e-12)
    assert torch.allclose(flow.kept(curvature), 1 - curvature * flow.put_in(curvature), atol=1e-12)


def test_many_small_heavy_ball_steps_are_exponential():
    curvature = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    ball, smooth = HeavyBall(200_000, 1e-5, 0.9), Exponential(200_000 * 1e-5 / 0.1)
    assert torch.allclose(ball.kept(curvature), smooth.kept(curvature), atol=1e-3)
    assert torch.allclose(ball.put_in(curvature), smooth.put_in(curvature), rtol=1e-3)
    past = HeavyBall(1000, 1.0, 0.9).kept(torch.tensor([100.0], dtype=torch.float64))
    assert past.abs() <= 1  # past the edge of stability


def test_heavy_ball_segments_equal_their_formula():
    run = CASE.record(RULES["momentum"])
    found = attribute(run, CASE.queries, method=Source(2, 1, Dense(), momentum="heavy_ball")).values
    costates, expected, rate = query_gradients(run, CASE.queries), 0.0, RULES["momentum"].options["lr"]
    eye = torch.eye(costates.shape[1], dtype=torch.float64)
    for segment in (1, 0):
        state = run.state(2 + 4 * segment)
        matrix, place, velocity, moved, pushed = dense_gauss_newton(run, state), eye, 0 * eye, 0 * eye, 0 * eye
        for _ in range(4):
            velocity = 0.7 * velocity + matrix @ place
            place = place - rate * velocity
            pushed = 0.7 * pushed + matrix @ moved + eye
            moved = moved - rate * pushed
        expected = expected + costates @ moved @ example_gradients(run, state).T / 14
        costates = costates @ place
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-12)


def two_stages():
    """Examples 0 to 7 for four steps, then 6 to 13 for six."""
    order = [torch.arange(start, start + 4) for start in (0, 4, 0, 4)] + [torch.arange(6, 10), torch.arange(10, 14)] * 3
    torch.manual_seed(0)
    return record(
        CASE.model(),
        CASE.examples,
        Classification(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.2),
        order=order,
    )


def test_stages_know_their_data():
    run = two_stages()
    found = attribute(run, CASE.queries, method=Source((1, 2), 1, Dense(), stages=(4,))).values
    costates, expected = query_gradients(run, CASE.queries), torch.zeros(4, 14, dtype=torch.float64)
    for step, length, ids in ((8, 3, torch.arange(6, 14)), (5, 3, torch.arange(6, 14)), (2, 4, torch.arange(8))):
        state = run.state(step)
        values, basis = torch.linalg.eigh(dense_gauss_newton(run, state, ids))
        flow = Exponential(0.2 * length)
        pulled = costates @ basis * flow.put_in(values.clamp(min=0)) @ basis.T
        expected[:, ids] -= pulled @ example_gradients(run, state)[ids].T / 8
        costates = costates @ basis * flow.kept(values.clamp(min=0)) @ basis.T
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-12)


def test_fast_takes_mean_parameters():
    run = CASE.record(RULES["sgd"])
    found = attribute(run, CASE.queries, method=Source(1, 2, Dense(), fast=True)).values
    states = [run.state(2), run.state(6)]
    mean = (flatten(states[0].params.values()) + flatten(states[1].params.values())) / 2
    state = TrainingState(unflatten(mean, states[0].params), {}, {}, 6)
    values, basis = torch.linalg.eigh(dense_gauss_newton(run, state))
    put_in = Exponential(0.2 * 8 * RULES["sgd"].options["lr"] / 0.2).put_in(values.clamp(min=0))
    expected = -query_gradients(run, CASE.queries) @ basis * put_in @ basis.T @ example_gradients(run, state).T / 14
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-12)
