"""Climbing to bifurcations and branching from them: against dense products, differences and maps with known separatrices."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrograd.cases import mixture, quadratic_game, small_dilemma
from retrograd.dynamics import (
    Archive,
    BranchTree,
    FunctionFlow,
    StepFlow,
    branch,
    eigen_directions,
    find_bifurcation,
    generalised_ridge_rider,
    separating_directions,
    top_exponents,
)
from retrograd.dynamics.bifurcation import differentiable_exponents
from retrograd.dynamics.branching import within
from retrograd.errors import InputError, NonFinite
from retrograd.trajectory import StepInputs, TrainingState, UpdateMap
from retrograd.update_rules import SGD

STARTS = torch.tensor([[1.0, 0.3], [-0.7, 0.2], [0.1, -1.0]], dtype=torch.float64)


def wells(w: torch.Tensor) -> torch.Tensor:
    """Descend (x² − 1)² / 4 + y²: attractors (±1, 0), separatrix x = 0."""
    return w - 0.2 * torch.stack([w[0] * (w[0] ** 2 - 1), 2 * w[1]])


def swirl(w: torch.Tensor) -> torch.Tensor:
    """Turn and shear: nothing symmetric about it."""
    return torch.stack([0.9 * w[0] - 0.5 * torch.sin(w[1]), 0.4 * w[0] + 1.1 * torch.tanh(w[1])])


def product(function, state, steps: int) -> torch.Tensor:
    total = torch.eye(len(state), dtype=state.dtype)
    for _ in range(steps):
        total, state = torch.autograd.functional.jacobian(function, state) @ total, function(state)
    return total


def flow_of_game(case, learning_rate: float = 1.0) -> StepFlow:
    hyper = {"learning_rate": learning_rate, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
    inputs = StepInputs(torch.tensor([0]), None, (hyper,), torch.zeros(1, dtype=torch.float64), seed=0)
    update_map = UpdateMap(case.game.profile(case.start), case.game, SGD(), groups=(case.players,))
    return StepFlow(update_map, lambda step: inputs, TrainingState(case.start, {}, {}, 0))


@pytest.mark.parametrize("flow", [FunctionFlow(swirl, 2), FunctionFlow(lambda step, w: swirl(w), 2, by_step=True)])
def test_exponents_and_directions_are_those_of_the_dense_product(flow):
    exponents, rows = separating_directions(flow, STARTS, 7, 2)
    for start, values, vectors in zip(STARTS, exponents, rows, strict=True):
        _, sigma, right = torch.linalg.svd(product(swirl, start, 7))
        torch.testing.assert_close(values, sigma.log() / 7)
        assert ((vectors * right).sum(1).abs() - 1).abs().max() < 1e-10


@pytest.mark.parametrize("count", [1, 2])
def test_the_short_way_to_exponents_gives_what_top_exponents_does_and_so_do_its_gradients(count):
    flow, found = FunctionFlow(swirl, 2), []
    for function in (differentiable_exponents, top_exponents):
        points = STARTS.clone().requires_grad_()
        values = function(flow, points, 6, count)
        weights = torch.tensor([[1.0, 0.7]], dtype=torch.float64)[:, :count]
        found.append((values.detach(), *torch.autograd.grad((weights * values).sum(), points)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_exponents_of_long_products_do_not_overflow():
    flow = FunctionFlow(lambda w: 1e3 * w, 2)
    exponents, _ = separating_directions(flow, torch.zeros(1, 2, dtype=torch.float64), 500, 2)
    torch.testing.assert_close(exponents, torch.full((1, 2), 1e3, dtype=torch.float64).log())


def test_steps_of_an_update_map_give_what_the_function_gives():
    case, start = small_dilemma(), torch.tensor([[0.3, 0.9], [1.2, -0.4]], dtype=torch.float64)
    plain, recorded = FunctionFlow(case.operator("simultaneous", 1.0), 2), flow_of_game(case)
    found = [find_bifurcation(flow, start, 2, ascent_steps=2) for flow in (plain, recorded)]
    torch.testing.assert_close(found[0].points, found[1].points)
    torch.testing.assert_close(found[0].exponents, found[1].exponents)
    ends = [branch(flow, start, 0.5, horizon=2, steps=3).ends for flow in (plain, recorded)]
    # Ends come in pairs, whose order is that of the sign of a singular vector.
    torch.testing.assert_close(ends[0].sum(3), ends[1].sum(3))
    torch.testing.assert_close((ends[0][..., 0, :] - ends[0][..., 1, :]).abs(), (ends[1][..., 0, :] - ends[1][..., 1, :]).abs())


@pytest.mark.parametrize("objective", ["max", "min", "sum", "entropy", "finite_size"])
def test_climbing_raises_the_objective_and_its_values_are_what_they_say(objective):
    flow, start = FunctionFlow(wells, 2), STARTS[:2]
    found = find_bifurcation(flow, start, 5, objective=objective, count=2, epsilon=0.1, ascent_steps=60, learning_rate=0.05)
    assert (found.values >= found.values_before - 1e-9).all()
    assert found.path.shape == (61, 2, 2)
    assert torch.equal(found.path[0], start)
    assert torch.equal(found.path[-1], found.points)
    for point, value in zip(found.points, found.values, strict=True):
        _, sigma, right = torch.linalg.svd(product(wells, point, 5))
        own = sigma.log() / 5
        ahead, behind = point + 0.1 * right[0], point - 0.1 * right[0]
        for _ in range(5):
            ahead, behind = wells(ahead), wells(behind)
        apart = ((ahead - behind).norm() / 0.2).log() / 5
        expected = {"max": own[0], "min": own[1], "sum": own.sum(), "entropy": own.clamp(min=0).sum(), "finite_size": apart}
        torch.testing.assert_close(value, expected[objective])


def test_the_largest_exponent_of_two_wells_is_on_the_ridge_between_them():
    found = find_bifurcation(FunctionFlow(wells, 2), STARTS, 5, ascent_steps=100, learning_rate=0.05)
    assert found.points[:, 0].abs().max() < 1e-2
    torch.testing.assert_close(found.exponents, torch.full((3, 1), 1.2, dtype=torch.float64).log(), atol=1e-3, rtol=0)
    assert (found.directions[:, 0, 0].abs() - 1).abs().max() < 1e-3


def test_branches_start_where_they_should_and_keep_their_paths():
    flow, points = FunctionFlow(wells, 2), STARTS[:2]
    units = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]], dtype=torch.float64).expand(2, 2, 2)
    found = branch(flow, points, (0.1, 0.4), units, steps=9, places=4)
    assert found.ends.shape == (2, 2, 2, 2, 2)
    assert found.paths is not None
    assert found.paths.shape[0] == 4
    for size, epsilon in enumerate((0.1, 0.4)):
        for side, sign in enumerate((1, -1)):
            state = points[1] + sign * epsilon * torch.tensor([1.0, 0.0], dtype=torch.float64)
            walked = [state]
            for _ in range(9):
                walked.append(wells(walked[-1]))
            torch.testing.assert_close(found.paths[:, 1, 0, size, side], torch.stack([walked[i] for i in (0, 3, 6, 9)]))
            torch.testing.assert_close(found.ends[1, 0, size, side], walked[9])
            torch.testing.assert_close(found.halfway[1, 0, size, side], walked[4])


def test_eigenvectors_of_a_complex_pair_span_the_plane_it_turns_in():
    case = quadratic_game([0.1 + 1j, 0.9 + 0j], seed=2)
    flow = FunctionFlow(case.operator("simultaneous", 0.5), 4)
    rows = eigen_directions(flow, torch.zeros(1, 4, dtype=torch.float64), 2)[0]
    step = torch.eye(4, dtype=torch.float64) - 0.5 * case.jacobian(torch.zeros(4, dtype=torch.float64))
    plane, _ = torch.linalg.qr(rows.T)
    moved = step @ rows.T  # the pair is the one of largest modulus: its plane is mapped to itself
    torch.testing.assert_close(plane @ (plane.T @ moved), moved)
    torch.testing.assert_close(rows @ rows.T, torch.eye(2, dtype=torch.float64), atol=1e-8, rtol=0)


def test_a_pair_that_turns_defeats_eigenvectors():
    case = mixture()
    flow = FunctionFlow(case.operator("extragradient", 5.0), 2)
    centre = torch.tensor([0.5286, 0.4411], dtype=torch.float64).logit()
    spinning = branch(flow, centre, 0.05, "eigen", count=2, steps=100)
    assert case.classify(spinning.ends.flatten(0, -2)) == ["centre"] * 4


@pytest.mark.slow
def test_climbing_finds_both_solutions_of_the_mixture():
    case = mixture()
    flow = FunctionFlow(case.operator("extragradient", 5.0), 2)
    found = find_bifurcation(flow, case.starts(16, seed=1, scale=0.5), 40)
    ends = branch(flow, found.points, 0.5, found.directions, steps=1000).ends
    both = [set(case.classify(own.flatten(0, -2))) == {"centre", "corner"} for own in ends]
    assert sum(both) >= 12


@pytest.mark.parametrize("remedies", [False, True])
def test_the_tree_of_two_wells(remedies, tmp_path):
    tree = generalised_ridge_rider(
        FunctionFlow(wells, 2),
        torch.tensor([[0.8, 0.1], [-0.9, 0.4]], dtype=torch.float64),
        2,
        epsilon=0.4,
        branch_steps=60,
        ascent_steps=12,
        learning_rate=0.1,
        remedies=remedies,
        places=3,
        depth=2,
    )
    assert sorted(round(solution[0].item(), 2) for solution in tree.solutions) == [-1.0, 1.0]
    assert tree.kinds() == ["climbed", "own", "random"]
    assert tree.shares("climbed") == 1.0
    assert tree.shares("own") == tree.shares("random") == 0.0
    for node in tree.branches():
        parent = tree.nodes[node.parent]
        assert node.depth == parent.depth + 1
        assert node.start == parent.start
        assert node.direction is not None
        torch.testing.assert_close(node.path[0], node.point + node.sign * node.epsilon * node.direction)
        torch.testing.assert_close(node.path[-1], node.end)
        assert (node.objective is None) == (node.kind != "climbed")
    assert max(node.depth for node in tree.branches("climbed")) == 2
    smallest = {node.epsilon for node in tree.branches("climbed")}
    assert max(smallest) < 0.4 if remedies else smallest == {0.4}
    tree.save(tmp_path / "tree.json")
    content = json.loads((tmp_path / "tree.json").read_text())
    assert len(content["nodes"]) == len(tree.nodes)
    assert content["nodes"] == tree.to_rows()
    assert "two or more from 2 of 2 starts" in str(tree)


def test_what_has_not_arrived_is_no_solution():
    tree = generalised_ridge_rider(
        FunctionFlow(lambda w: w + 1, 1), torch.zeros(1, dtype=torch.float64), 2, branch_steps=10, ascent_steps=1, depth=3
    )
    assert tree.solutions == []
    assert all(node.solution is None for node in tree.branches())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_the_archive_numbers_solutions_in_the_order_of_their_discovery(values):
    archive = Archive(within(0.4))
    numbers = [archive.add(torch.tensor([float(value)]), torch.tensor([value + 0.1])) for value in values]
    order = list(dict.fromkeys(values))
    assert numbers == [order.index(value) for value in values]


def test_a_tree_without_branches_has_no_shares():
    tree = BranchTree(torch.zeros(2, 3), Archive(within(0.1)))
    assert tree.shares("own") == 0.0
    assert tree.branches() == []
    assert tree.kinds() == []


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda f: find_bifurcation(f, STARTS[0], 0), InputError, "steps at least 1"),
        (lambda f: find_bifurcation(f, STARTS[0], 2, count=3), InputError, "count must be from 1 to 2"),
        (lambda f: find_bifurcation(f, torch.zeros(3), 2), InputError, "vectors of 2 numbers"),
        (lambda f: branch(f, STARTS, 0.1), InputError, "give horizon=k"),
        (lambda f: branch(f, STARTS, 0.0, horizon=2), InputError, "epsilon must be above 0"),
        (lambda f: branch(f, STARTS, 0.1, horizon=2, places=1), InputError, "places 0 or at least 2"),
        (lambda f: branch(f, 1e3 * STARTS, 0.1, horizon=1, steps=20), NonFinite, "left the finite numbers"),
        (lambda f: find_bifurcation(f, 1e3 * STARTS, 20), NonFinite, "not finite"),
        (lambda f: generalised_ridge_rider(f, STARTS, 2, depth=0), InputError, "depth must be at least 1"),
        (lambda f: eigen_directions(f, STARTS, 3), InputError, "2 directions here, asked for 3"),
    ],
)
def test_refusals(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong(FunctionFlow(wells, 2))
