"""The ready-made games: payoffs, stationary points and spectra, by closed forms, plain loops and published values."""

import cmath
import math

import pytest
import torch

from retrograd.cases import (
    bilinear,
    dirac_gan,
    iterated_prisoners_dilemma,
    matching_pennies,
    mixed_game,
    mixture,
    projected_dilemma,
    quadratic_game,
    small_dilemma,
)
from retrograd.dynamics import StepFlow
from retrograd.errors import InputError
from retrograd.trajectory import StepInputs, TrainingState, UpdateMap
from retrograd.update_rules import SGD

CASES = {
    case.name: case
    for case in (
        dirac_gan(),
        bilinear(seed=3),
        mixed_game(torch.tensor([0.2, 0.9], dtype=torch.float64)),
        quadratic_game([1 + 2j, 0.5], seed=1),
        matching_pennies(),
        small_dilemma(),
        mixture(),
        iterated_prisoners_dilemma(),
        projected_dilemma(seed=4),
    )
}


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).logit()


def eigenvalues(case, point) -> list[complex]:
    return sorted(torch.linalg.eigvals(case.jacobian(point)).tolist(), key=lambda value: (round(value.real, 9), value.imag))


def played(first: list[float], second: list[float], discount: float, rounds: int) -> list[float]:
    """Play round by round; a player's list says how likely it cooperates at first, after CC, CD, DC, DD."""
    costs = {(True, True): (1, 1), (True, False): (3, 0), (False, True): (0, 3), (False, False): (2, 2)}
    after = {(True, True): 1, (True, False): 2, (False, True): 3, (False, False): 4}
    likely = {None: 1.0}
    totals = [0.0, 0.0]
    for round_ in range(rounds):
        new = dict.fromkeys(costs, 0.0)
        for state, share in likely.items():
            p, q = (own[0 if state is None else after[state]] for own in (first, second))
            for a, b in costs:
                new[a, b] += share * (p if a else 1 - p) * (q if b else 1 - q)
        for outcome, share in new.items():
            for player in (0, 1):
                totals[player] += (1 - discount) * discount**round_ * share * costs[outcome][player]
        likely = new
    return totals


def test_small_dilemma_has_the_known_values():
    case = small_dilemma()
    # (probabilities, losses); the published 1.007 for CC is that of logits near 7, where training gets to; the limit is 1.
    known = {(1, 1): (1.0, 1.0), (0, 0): (1.959, 1.959), (1, 0): (2.10, 1.69), (0.6031, 0.6031): (1.794, 1.794)}
    for probabilities, losses in known.items():
        point = logits(*probabilities).clamp(-40, 40)
        torch.testing.assert_close(case.losses(point), torch.tensor(losses, dtype=torch.float64), atol=4e-3, rtol=0)
    torch.testing.assert_close(
        case.losses(logits(0.999, 0.999)), torch.full((2,), 1.007, dtype=torch.float64), atol=2e-3, rtol=0
    )
    saddle = logits(0.6031, 0.6031)
    assert case.gradient(saddle).abs().max() < 1e-4
    assert [round(value.real, 4) for value in eigenvalues(case, saddle)] == [-0.0393, 0.0393]


def test_matching_pennies_turns_around_one_half():
    case = matching_pennies()
    assert case.gradient(torch.zeros(2)).abs().max() == 0
    assert eigenvalues(case, torch.zeros(2)) == pytest.approx([-0.25j, 0.25j])
    torch.testing.assert_close(case.losses(logits(0.7, 0.2)), torch.tensor([-0.24, 0.24], dtype=torch.float64))


def test_the_mixture_turns_around_its_centre():
    case = mixture()
    centre = logits(0.5286, 0.4411)
    assert case.gradient(centre).abs().max() < 1e-4
    torch.testing.assert_close(case.losses(centre), torch.tensor([1.4025, 1.3727], dtype=torch.float64), atol=1e-4, rtol=0)
    values = eigenvalues(case, centre)
    assert [(round(value.real, 4), round(value.imag, 4)) for value in values] == [(0.0022, -0.0609), (0.0022, 0.0609)]
    assert case.classify(torch.stack([centre, torch.full((2,), 9.0).double(), logits(0.9, 0.1)])) == ["centre", "corner", None]
    point = logits(0.3, 0.8)
    mixed = 0.25 * matching_pennies().losses(point) + 0.75 * small_dilemma().losses(point)
    torch.testing.assert_close(case.losses(point), mixed)


def test_dilemmas_equal_play_round_by_round():
    p, q, f = 0.3, 0.8, 1 / (1 + math.exp(3))
    expected = played([p, p, f, p, f], [q, q, q, f, f], 0.9, rounds=400)
    torch.testing.assert_close(small_dilemma().losses(logits(p, q)), torch.tensor(expected, dtype=torch.float64))
    first, second = [0.2, 0.9, 0.3, 0.6, 0.1], [0.7, 0.4, 0.8, 0.2, 0.5]
    expected = played(first, second, 0.96, rounds=1000)
    case = iterated_prisoners_dilemma()
    torch.testing.assert_close(case.losses(logits(*first, *second)), torch.tensor(expected, dtype=torch.float64))


def test_the_projected_dilemma_moves_each_players_own_logits():
    full, case = iterated_prisoners_dilemma(), projected_dilemma(seed=4)
    start = [0.5, 0.75, 0.25, 0.75, 0.25, 0.5, 0.75, 0.75, 0.25, 0.25]
    torch.testing.assert_close(case.losses(torch.zeros(2, dtype=torch.float64)), full.losses(logits(*start)))
    weights = 4 * torch.rand(2, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64) - 2
    moved = logits(*start) + torch.cat([0.3 * weights[0], -0.7 * weights[1]])
    point = torch.tensor([0.3, -0.7], dtype=torch.float64)
    torch.testing.assert_close(case.losses(point), full.losses(moved))
    taxed = projected_dilemma(seed=4, penalty=2.0).losses(point) - case.losses(point)
    torch.testing.assert_close(taxed, torch.full((2,), 2 * (0.09 + 0.49), dtype=torch.float64))


def test_zero_sum_games_have_the_spectrum_they_promise():
    assert eigenvalues(dirac_gan(), torch.zeros(2).double()) == pytest.approx([-0.5j, 0.5j])
    assert eigenvalues(mixed_game(0.75), torch.zeros(2).double()) == pytest.approx([0.25 - 0.75j, 0.25 + 0.75j])
    spectrum = [cmath.rect(1.0, 0.3), 2 + 0j, 1j]
    case = quadratic_game(spectrum, seed=5)
    found = eigenvalues(case, torch.randn(6).double())
    for value in spectrum:
        assert min(abs(value - own) for own in found) < 1e-7
        assert min(abs(value.conjugate() - own) for own in found) < 1e-7
    matrix = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    values = torch.tensor(eigenvalues(bilinear(matrix), torch.zeros(5).double())).imag.sort(descending=True).values
    torch.testing.assert_close(values[:2].double(), torch.linalg.svdvals(matrix), rtol=1e-6, atol=0)


def test_the_mixed_game_has_the_jacobian_of_its_formula():
    generator = torch.Generator().manual_seed(0)
    a, b, h = (torch.randn(2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    gamma = torch.tensor([0.3, 0.8], dtype=torch.float64)
    turning, own = gamma.diag() @ a, [(1 - gamma).diag() @ part for part in (b, h)]
    expected = torch.cat([torch.cat([own[0] + own[0].T, turning], 1), torch.cat([-turning.T, own[1] + own[1].T], 1)])
    torch.testing.assert_close(mixed_game(gamma, a, b, h).jacobian(torch.zeros(4).double()), expected)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_differences_also_for_many_points_at_once(name):
    """Under vmap torch's forward mode is wrong for some operations (linalg.solve in torch 2.13): cases must not use them."""
    case = CASES[name]
    points = case.starts(3, seed=0)
    unit, size = torch.eye(case.dim, dtype=torch.float64), 1e-5
    slopes = torch.stack([case.gradient(p) for p in points])
    for point, slope in zip(points, slopes, strict=True):
        wide = torch.stack([(case.losses(point + size * e) - case.losses(point - size * e)) / (2 * size) for e in unit], dim=1)
        owner = [i for i, player in enumerate(case.players) for _ in range(case.start[player].numel())]
        torch.testing.assert_close(slope, wide[owner, range(case.dim)], atol=1e-8, rtol=1e-6)
    jacobians = torch.func.vmap(torch.func.jacfwd(case.gradient))(points)
    for point, jacobian in zip(points, jacobians, strict=True):
        wide = torch.stack(
            [(case.gradient(point + size * e) - case.gradient(point - size * e)) / (2 * size) for e in unit], dim=1
        )
        torch.testing.assert_close(jacobian, wide, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(torch.func.vmap(case.gradient)(points), slopes)


@pytest.mark.parametrize("name", CASES)
def test_the_operator_is_a_step_of_the_update_map(name):
    case = CASES[name]
    hyper = {"learning_rate": 0.3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
    inputs = StepInputs(torch.tensor([0]), None, (hyper,), torch.zeros(1, dtype=torch.float64), seed=0)
    update_map = UpdateMap(case.game.profile(case.start), case.game, SGD(), groups=(case.players,))
    flow = StepFlow(update_map, lambda step: inputs, TrainingState(case.start, {}, {}, 0))
    point = case.starts(1, seed=1)[0]
    plain = case.operator("simultaneous", 0.3)
    torch.testing.assert_close(flow(0, point), plain(point))
    torch.testing.assert_close(flow.push(0, point, torch.eye(case.dim).double())[1].T, torch.func.jacfwd(plain)(point))


def test_extragradient_is_a_step_of_the_update_map():
    directions = pytest.importorskip("retrograd.directions")
    case = mixture()
    hyper = {"learning_rate": 5.0, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
    inputs = StepInputs(torch.tensor([0]), None, (hyper,), torch.zeros(1, dtype=torch.float64), seed=0)
    profile, direction = case.game.profile(case.start), directions.Extragradient()
    update_map = UpdateMap(profile, case.game, SGD(), groups=(case.players,), direction=direction)
    flow = StepFlow(update_map, lambda step: inputs, TrainingState(case.start, {}, {}, 0))
    point = case.starts(1, seed=1)[0]
    plain = case.operator("extragradient", 5.0)
    torch.testing.assert_close(flow(0, point), plain(point))
    torch.testing.assert_close(flow.push(0, point, torch.eye(2).double())[1].T, torch.func.jacfwd(plain)(point))


def test_vectors_and_players():
    case = iterated_prisoners_dilemma()
    vector = torch.arange(10.0)
    values = case.unflatten(vector)
    assert list(values) == ["first", "second"]
    assert torch.equal(values["second"], vector[5:])
    assert torch.equal(case.flatten(values), vector)
    assert torch.equal(case.starts(3, seed=7), case.starts(3, seed=7))
    assert case.starts(3, seed=7).shape == (3, 10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: small_dilemma(discount=1.0), "discount must be from 0 to below 1"),
        (lambda: mixture(pennies=1.5), "pennies must be a share"),
        (lambda: mixed_game(2.0), r"rotation must lie in \[0, 1\]"),
        (lambda: mixed_game(torch.ones(3), torch.eye(2)), "must be of one size"),
        (lambda: quadratic_game([]), "spectrum is empty"),
        (lambda: dirac_gan().operator("simultaneous", 0.0), "learning_rate must be positive"),
        (lambda: dirac_gan().classify(torch.zeros(1, 2)), "no solutions are known"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()
