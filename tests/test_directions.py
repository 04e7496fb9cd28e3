"""Directions against their formulas with explicit Jacobians, float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from retrograd.directions import (
    LOLA,
    Competitive,
    Consensus,
    Direction,
    Extragradient,
    LookAhead,
    StableOpponentShaping,
    SymplecticAdjustment,
)
from retrograd.errors import InputError
from retrograd.params import Params, flatten, unflatten

SIZES = {"a": 2, "b": 3, "c": 1}  # three players, the second with two tensors
NAMES = {"a": ("a",), "b": ("b/left", "b/right"), "c": ("c",)}
SHAPES: Params = {"a": torch.zeros(2), "b/left": torch.zeros(2), "b/right": torch.zeros(1), "c": torch.zeros(1)}
DIM = 6
RATE = 0.3


def coefficients() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    square = torch.randn(3, DIM, DIM, generator=draw, dtype=torch.float64)
    return square, torch.randn(3, DIM, generator=draw, dtype=torch.float64)


SQUARE, TILT = coefficients()


def loss(player: int, w: Tensor) -> Tensor:
    """A loss that is neither quadratic nor symmetric between players."""
    return w @ SQUARE[player] @ w / 4 + (TILT[player] * w.sin()).sum() + (w[0] * w[2] * w[5]) * (player + 1) / 3


class Given:
    """The game above, as a `Field`."""

    players = NAMES

    def __call__(self, params: Params, buffers: Params) -> tuple[Params, Params]:
        found: Params = {}
        for player, names in self.players.items():
            own = {name: params[name] for name in names}
            found |= torch.func.grad(lambda moved, player=player: self.loss(player, {**params, **moved}, buffers))(own)
        return found, buffers

    def loss(self, player: str, params: Params, buffers: Params) -> Tensor:
        return loss("abc".index(player), flatten(params.values()))


BLOCK = torch.tensor([0, 0, 1, 1, 1, 2])
SAME = (BLOCK[:, None] == BLOCK[None]).double()


def slopes(w: Tensor) -> Tensor:
    """∂L_i/∂w of every player, ``[3, DIM]``."""
    return torch.stack([torch.func.grad(lambda at, i=i: loss(i, at))(w) for i in range(3)])


def gradient(w: Tensor) -> Tensor:
    return slopes(w)[BLOCK, torch.arange(DIM)]


def parts(w: Tensor) -> dict[str, Tensor]:
    jacobian: Any = torch.func.jacrev(gradient)(w)
    others = jacobian * (1 - SAME)
    gains = slopes(w)
    # χ_i = Σ_{j≠i} (∂²L_j/∂w_i∂w_j) ∂L_i/∂w_j: row k of ∂v/∂w is L_owner(k)'s
    chi = torch.stack([sum((others[j, k] * gains[BLOCK[k], j] for j in range(DIM)), torch.tensor(0.0)) for k in range(DIM)])
    return {"v": gradient(w), "J": jacobian, "others": others, "chi": chi}


def consensus(w: Tensor) -> Tensor:
    p = parts(w)
    return p["v"] + RATE * p["J"].T @ p["v"]


def symplectic(w: Tensor) -> Tensor:
    p = parts(w)
    skew = (p["J"] - p["J"].T) / 2
    back, turned = p["J"].T @ p["v"], skew.T @ p["v"]
    sign = torch.sign((p["v"] @ back) * (turned @ back) / DIM + 0.1)
    return p["v"] + RATE * sign * turned


def look_ahead(w: Tensor) -> Tensor:
    p = parts(w)
    return p["v"] - RATE * p["others"] @ p["v"]


def lola(w: Tensor) -> Tensor:
    return look_ahead(w) - RATE * parts(w)["chi"]


def shaping(w: Tensor, b: float = 0.1) -> Tensor:
    p, ahead = parts(w), look_ahead(w)
    inner = (-RATE * p["chi"]) @ ahead
    first = 1.0 if inner >= 0 else min(1.0, float(-0.5 * ahead @ ahead / inner))
    second = float(p["v"] @ p["v"]) if p["v"].norm() < b else 1.0
    return ahead - min(first, second) * RATE * p["chi"]


FORMULAS = {
    Extragradient(RATE): lambda w: gradient(w - RATE * gradient(w)),
    Extragradient(): lambda w: gradient(w - 0.2 * gradient(w)),
    Consensus(RATE): consensus,
    SymplecticAdjustment(RATE): symplectic,
    LookAhead(RATE): look_ahead,
    LOLA(RATE): lola,
    StableOpponentShaping(RATE): shaping,
    Competitive(RATE): lambda w: torch.linalg.solve(torch.eye(DIM) + RATE * parts(w)["others"], parts(w)["v"]),
}


def directed(direction: Direction, w: Tensor) -> Tensor:
    found, _ = direction(Given(), unflatten(w, SHAPES), {}, dict.fromkeys(SHAPES, 0.2))
    return flatten(found[name] for name in SHAPES)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("direction", FORMULAS, ids=str)
def test_direction_equals_its_formula(direction, seed):
    w = torch.randn(DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(directed(direction, w), FORMULAS[direction](w), rtol=0, atol=1e-10)


@pytest.mark.parametrize("direction", FORMULAS, ids=str)
def test_direction_can_be_differentiated_both_ways(direction):
    w = torch.randn(DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    forward: Any = torch.func.jacfwd(lambda at: directed(direction, at))(w)
    backward: Any = torch.func.jacrev(lambda at: directed(direction, at))(w)
    step = 1e-6 * torch.eye(DIM, dtype=torch.float64)
    central = torch.stack([(directed(direction, w + row) - directed(direction, w - row)) / 2e-6 for row in step], 1)
    torch.testing.assert_close(forward, backward, rtol=0, atol=1e-9)
    torch.testing.assert_close(forward, central, rtol=1e-5, atol=1e-6)


def share_of_shaping(w: Tensor, b: float) -> float:
    step, chi = directed(StableOpponentShaping(RATE, b=b), w), parts(w)["chi"]
    torch.testing.assert_close(step, shaping(w, b), rtol=0, atol=1e-9)
    return (((look_ahead(w) - step) @ chi) / (RATE * chi @ chi)).item()


def test_opponent_shaping_takes_every_branch():
    """The share of shaping is 1, is cut by the first criterion, and fades by the second."""
    points = [torch.randn(DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1)]
    assert share_of_shaping(points[1], 0.1) == pytest.approx(1)
    assert 0.1 < share_of_shaping(points[0], 0.1) < 0.95
    flat = points[1]
    for _ in range(30):  # damped Gauss-Newton steps, to where the gradient is short
        jacobian = parts(flat)["J"]
        flat = flat - torch.linalg.solve(jacobian.T @ jacobian + 1e-3 * torch.eye(DIM), jacobian.T @ gradient(flat))
    assert gradient(flat).norm() < 0.5
    assert share_of_shaping(flat, 100.0) == pytest.approx(gradient(flat).square().sum().item())


def test_competitive_step_ends_when_solved():
    """More iterations than are needed give the same, with a derivative that is finite."""
    w = torch.randn(DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    many = Competitive(RATE, iterations=9)
    torch.testing.assert_close(directed(many, w), directed(Competitive(RATE), w), rtol=0, atol=1e-9)
    leaf = w.clone().requires_grad_()
    along = torch.arange(1.0, DIM + 1, dtype=torch.float64)
    (found,) = torch.autograd.grad(directed(many, leaf) @ along, leaf)
    (expected,) = torch.autograd.grad(directed(Competitive(RATE), leaf) @ along, leaf)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_a_competitive_step_of_many_points_at_once():
    """torch.linalg.solve is pushed forward wrongly under vmap; its place is taken by inv."""
    many = torch.randn(3, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    together: Any = torch.func.vmap(torch.func.jacfwd(lambda at: directed(Competitive(RATE), at)))(many)
    for point, found in zip(many, together, strict=True):
        expected: Any = torch.func.jacrev(FORMULAS[Competitive(RATE)])(point)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_system_too_large_to_write_out_is_refused(monkeypatch):
    monkeypatch.setattr("retrograd.directions.competitive.DENSE", 5)
    with pytest.raises(InputError, match="iterations=20"):
        directed(Competitive(RATE), torch.ones(DIM, dtype=torch.float64))
