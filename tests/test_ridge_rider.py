"""Ridge Rider on functions whose minima, saddles and ridges are known."""

import pytest
import torch

from retrograd.dynamics import ridge_rider
from retrograd.errors import InputError, NonFinite

ZERO = torch.zeros(2, dtype=torch.float64)


def four_wells(w: torch.Tensor) -> torch.Tensor:
    """(x² − 1)² + 2 (y² − 1)²: minima (±1, ±1), a maximum at 0, saddles (±1, 0) and (0, ±1)."""
    return (w[0] ** 2 - 1) ** 2 + 2 * (w[1] ** 2 - 1) ** 2


def bent(w: torch.Tensor) -> torch.Tensor:
    """Two wells at the ends of an arc: the ridge turns, so that a straight line would leave it."""
    x, y = w[0], w[1]
    return (x**2 - 1) ** 2 + 20 * (y - x**2) ** 2


def rounded(tree) -> list[tuple[float, ...]]:
    return sorted(tuple(round(value, 3) + 0.0 for value in solution.tolist()) for solution in tree.solutions)


@pytest.mark.parametrize("dense", [True, False])
def test_all_four_minima_from_the_top(dense):
    tree = ridge_rider(
        four_wells, ZERO, learning_rate=0.05, count=2, depth=2, dense=dense, krylov=2, ride_length=0.1, descent_steps=80
    )
    minima = [(-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)]
    assert set(minima) <= set(rounded(tree))
    first = tree.branches()[0]
    assert first.depth == 1
    assert first.exponents == pytest.approx((-8.0,))
    assert first.direction.abs().tolist() == pytest.approx([0, 1])
    below = [node for node in tree.branches() if node.depth == 2]
    assert below
    assert all(tree.nodes[node.parent].depth == 1 and node.exponents[0] < 0 for node in below)


def test_a_ride_ends_where_its_curvature_does():
    tree = ridge_rider(four_wells, ZERO, learning_rate=0.05, places=400, ride_length=0.005, descent_steps=100)
    for node in tree.branches():
        ride = node.path[:400]
        # ∂²/∂y² of 2 (y² − 1)² is 24y² − 8: negative up to 1/√3
        assert abs(abs(ride[-1, 1].item()) - 3**-0.5) < 0.006
        assert ride[:, 0].abs().max() < 1e-9
        torch.testing.assert_close(node.path[400], ride[-1])
        torch.testing.assert_close(node.path[-1], node.end)


@pytest.mark.parametrize("dense", [True, False])
def test_the_ride_follows_a_ridge_that_turns(dense):
    tree = ridge_rider(bent, ZERO, learning_rate=0.008, ride_length=0.03, dense=dense, krylov=2, places=50, descent_steps=1000)
    assert rounded(tree) == [(-1.0, 1.0), (1.0, 1.0)]
    for node in tree.branches():
        steps = node.path[1:50] - node.path[:49]
        moving = steps.norm(dim=1) > 0
        turned = torch.nn.functional.cosine_similarity(steps[moving][:-1], steps[moving][1:], dim=1)
        assert (turned > 0.5).all()
        assert steps[moving][0, 0].sign() == node.sign * node.direction[0].sign()


def test_many_dimensions_by_lanczos():
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))[0]
    stiff = torch.linspace(0.5, 3, 29, dtype=torch.float64)

    def loss(w: torch.Tensor) -> torch.Tensor:
        own = turn @ w
        return (own[0] ** 2 - 1) ** 2 + (stiff * own[1:] ** 2).sum()

    start = torch.zeros(30, dtype=torch.float64)
    tree = ridge_rider(loss, start, descent_steps=100, learning_rate=0.1, ride_length=0.1, dense=False, krylov=15)
    ends = torch.stack([turn @ solution for solution in tree.solutions])
    assert sorted(ends[:, 0].round(decimals=3).tolist()) == [-1.0, 1.0]
    assert ends[:, 1:].abs().max() < 1e-3


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (lambda w: (w**2).sum(), {}, InputError, "it is no saddle"),
        (four_wells, {"learning_rate": 0.0}, InputError, "learning_rate and ride_length must be above 0"),
        (four_wells, {"depth": 0}, InputError, "depth at least 1"),
        (four_wells, {"learning_rate": 10.0}, NonFinite, "left the finite numbers"),
    ],
)
def test_refusals(loss, options, error, message):
    with pytest.raises(error, match=message):
        ridge_rider(loss, ZERO, **{"learning_rate": 0.05, **options})
