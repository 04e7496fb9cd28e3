"""Pictures of games: what is drawn is what was computed."""

import math
from typing import Any

import pytest
import torch

from retrograd import cases
from retrograd.dynamics import BranchTree
from retrograd.dynamics.branching import Archive, within
from retrograd.errors import InputError
from retrograd.report import branch_tree_figure, phase_portrait, spectrum_figure

pytest.importorskip("plotly")


def trace(figure: Any, name: str) -> Any:
    return next(one for one in figure.data if one.name == name)


def test_arrows_of_the_dirac_gan_turn_about_the_equilibrium():
    figure = phase_portrait(cases.dirac_gan(), extent=2.0, arrows=5)
    arrows = trace(figure, "−g")
    x, y = (torch.tensor([math.nan if v is None else v for v in axis]).view(-1, 3) for axis in (arrows.x, arrows.y))
    tails, heads = torch.stack([x[:, 0], y[:, 0]], 1), torch.stack([x[:, 1], y[:, 1]], 1)
    away = tails.norm(dim=1) > 1e-6
    moved = (heads - tails)[away]
    expected = -torch.stack([cases.dirac_gan().gradient(tail.double()) for tail in tails])[away].float()
    assert int(away.sum()) == 24
    torch.testing.assert_close(moved / moved.norm(dim=1, keepdim=True), expected / expected.norm(dim=1, keepdim=True))
    torch.testing.assert_close(moved.norm(dim=1), torch.full((24,), 0.7))


def test_a_portrait_of_a_larger_game_lies_in_a_plane():
    case = cases.iterated_prisoners_dilemma()
    centre, across = torch.ones(case.dim), torch.arange(1.0, case.dim + 1)
    path = torch.stack([centre, centre + 2 * across / across.norm()])
    figure = phase_portrait(case, [path], centre=centre, across=across, arrows=3, shown=lambda places: 10 * places)
    drawn = trace(figure, "path 0")
    assert drawn.x == pytest.approx((0.0, 20.0))
    assert drawn.y == pytest.approx((0.0, 0.0), abs=1e-5)
    with pytest.raises(InputError, match="same line"):
        phase_portrait(case, across=across, up=2 * across)
    with pytest.raises(InputError, match="at least 2"):
        phase_portrait(case, arrows=1)


@pytest.mark.parametrize(
    "case",
    [
        cases.dirac_gan(),
        cases.bilinear(torch.eye(1)),
        cases.matching_pennies(),
        cases.small_dilemma(),
        cases.mixture(),
        cases.iterated_prisoners_dilemma(),
        cases.projected_dilemma(),
    ],
    ids=lambda case: case.name,
)
def test_every_case_has_its_pictures(case):
    point = case.starts(1, seed=0)[0]
    path = [point]
    for _ in range(3):
        path.append(case.operator("extragradient", 0.1)(path[-1]))
    assert len(phase_portrait(case, [torch.stack(path)], arrows=4, shown=torch.sigmoid).data) == 4
    step = torch.eye(case.dim) - 0.1 * case.jacobian(point).float()
    figure = spectrum_figure(torch.linalg.eigvals(step))
    assert sum(len(one.x) for one in figure.data if one.name != "|λ| = 1") == case.dim


def test_eigenvalues_are_sorted_by_the_unit_circle():
    figure = spectrum_figure(torch.tensor([0.5 + 0.5j, 1.5j, -0.25]))
    assert sorted(trace(figure, "shrinks").x) == pytest.approx([-0.25, 0.5])
    assert trace(figure, "grows or stays").y == pytest.approx((1.5,))


def test_branches_have_the_colour_of_their_solution():
    tree = BranchTree(torch.zeros(1, 2), Archive(within(0.1)))
    ends = {1: torch.tensor([1.0, 0.0]), -1: torch.tensor([-1.0, 0.0])}
    for sign, end in ends.items():
        tree.add(0, "climbed", torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), sign, 0.5, end=end, halfway=end)
    lost = torch.tensor([0.0, 5.0])
    tree.add(0, "own", torch.zeros(2), torch.tensor([0.0, 1.0]), 1, 0.5, end=lost, halfway=torch.zeros(2))
    figure = branch_tree_figure(tree)
    first, second, third, start = figure.data
    assert (first.x[-1], second.x[-1]) == (1.0, -1.0)
    assert list(first.y) == [0.0, 1.0, 0.0]
    assert first.line.color != second.line.color
    assert (third.name, third.line.dash, start.name) == ("not arrived", "dot", "start")
    assert figure.layout.title.text == "2 solutions"
    line = BranchTree(torch.zeros(1, 1), Archive(within(0.1)))
    with pytest.raises(InputError, match="shown="):
        branch_tree_figure(line)
