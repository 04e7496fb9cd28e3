"""Two-player matrix games, once and iterated, with logits as parameters.

    L_i = −(1 − γ) s_0ᵀ (I − γP)^{-1} r_i          the iterated prisoner's dilemma
    L_1 = (2p − 1)(2q − 1) = −L_2                  matching pennies
    L_i = τ · pennies_i + (1 − τ) · small dilemma_i         their mixture

states     (first's action, second's action): CC, CD, DC, DD, with C to cooperate and D to defect;
r_1, r_2   rewards (−1, −3, 0, −2) and (−1, 0, −3, −2);
s_0        probabilities of the states in the first round, [pq, p(1−q), (1−p)q, (1−p)(1−q)];
P          row s: the same products of the probabilities to cooperate after state s;
γ          discount: the loss is the expected mean cost of a round, those in t rounds weighted by γ^t;
p, q       sigmoids of logits: the probabilities to cooperate.

In the full game each player has five logits: for the first round, and after CC, CD, DC, DD, in this order for both. In the
small one each has a single logit: it cooperates with that probability at first and after the other has cooperated, and with
probability σ(−3) after the other has defected.

Where it fails: probabilities 0 and 1 lie at infinite logits, where gradients vanish. Training towards them slows down as 1/t,
so that ends of training are told apart by losses or probabilities, not by logits.

References: Foerster et al. (2018), "Learning with opponent-learning awareness", for the iterated dilemma with five logits;
Lorraine et al. (2022), "Lyapunov exponents for diversity in differentiable games", arXiv 2112.14570, for the others.
"""

import math

import torch
from torch import Tensor

from retrograd.cases.game_case import GameCase, Losses
from retrograd.errors import InputError
from retrograd.game import FunctionGame

REWARDS = torch.tensor([[-1.0, -3.0, 0.0, -2.0], [-1.0, 0.0, -3.0, -2.0]], dtype=torch.float64)  # [player, state]
UNFORGIVING = 1 / (1 + math.exp(3))  # σ(−3): to cooperate although the other has defected


def iterated_prisoners_dilemma(discount: float = 0.96) -> GameCase:
    """Return the iterated prisoner's dilemma with five logits a player.

    Args:
        discount: γ, from 0 to below 1.

    Raises:
        InputError: the discount is not in that range.

    >>> case = iterated_prisoners_dilemma()
    >>> always = case.flatten({player: torch.full((5,), 50.0) for player in case.players})
    >>> case.losses(always), case.losses(-always)              # everybody cooperates, everybody defects
    (tensor([1.0000, 1.0000]), tensor([2.0000, 2.0000]))
    """
    discount = _checked(discount)
    losses = _two_players(lambda first, second: _full(first, second, discount))
    return GameCase("iterated prisoner's dilemma", FunctionGame(losses), _logits(5))


def small_dilemma(discount: float = 0.9) -> GameCase:
    """Return the iterated prisoner's dilemma with one logit a player.

    At the default discount there is one saddle, at p = q ≈ .6031, between two solutions: both answer cooperation with
    cooperation (losses 1), and both defect (losses 1.959).

    Args:
        discount: γ, from 0 to below 1.

    Raises:
        InputError: the discount is not in that range.

    >>> small_dilemma().losses(torch.tensor([-50.0, -50.0], dtype=torch.float64))
    tensor([1.9591, 1.9591], dtype=torch.float64)
    """
    discount = _checked(discount)
    losses = _two_players(lambda first, second: _small(first, second, discount))
    never = torch.tensor(-800.0, dtype=torch.float64)
    defect = _small(never, never, discount).tolist()
    return GameCase("small dilemma", FunctionGame(losses), _logits(), {"cooperate": (1.0, 1.0), "defect": tuple(defect)})


def matching_pennies() -> GameCase:
    """Return matching pennies: the second wants the same as the first, the first does not.

    One fixed point, p = q = 1/2, around which simultaneous descent turns: the Jacobian's eigenvalues are ±i/4.

    >>> matching_pennies().jacobian(torch.zeros(2))
    tensor([[ 0.0000,  0.2500],
            [-0.2500, -0.0000]])
    """
    return GameCase("matching pennies", FunctionGame(_two_players(_pennies)), _logits())


def mixture(pennies: float = 0.25, discount: float = 0.9) -> GameCase:
    """Return matching pennies and the small dilemma, mixed: a solution in a corner, and one that training turns around.

    Args:
        pennies: τ, the share of matching pennies, from 0 to 1.
        discount: γ of the dilemma, from 0 to below 1.

    At the default shares the solutions are ``"corner"``, p = q = 1 with losses (1, .5), and ``"centre"``, p ≈ .5286, q ≈ .4411
    with losses (1.4025, 1.3727) and eigenvalues .0022 ± .0609i of the Jacobian. Whether training can end in the centre depends
    on the method: simultaneous descent with learning rate 5 leaves it, extragradient does not.

    Raises:
        InputError: a number is not in its range.

    >>> mixture().losses(torch.tensor([50.0, 50.0], dtype=torch.float64))
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    if not 0 <= pennies <= 1:
        raise InputError(f"pennies must be a share from 0 to 1, got {pennies}.")
    discount = _checked(discount)

    def both(first: Tensor, second: Tensor) -> Tensor:
        return pennies * _pennies(first, second) + (1 - pennies) * _small(first, second, discount)

    known = {"corner": (1.0, 0.5), "centre": (1.4025, 1.3727)} if (pennies, discount) == (0.25, 0.9) else {}
    return GameCase("mixture", FunctionGame(_two_players(both)), _logits(), known)


def projected_dilemma(seed: int = 0, discount: float = 0.96, penalty: float = 0.0) -> GameCase:
    """Return the full dilemma on a random plane: one number a player moves all of its five logits.

        logits = Wθ + b,  L_i + penalty · ‖θ‖²

    W is uniform on [−2, 2]; each player's number moves its own logits only. b are the logits of (.5, .75, .25, .75, .25) and of
    (.5, .75, .75, .25, .25): both start out answering like with like, three times in four.

    Args:
        seed: of W.
        discount: γ, from 0 to below 1.
        penalty: on the numbers.

    Raises:
        InputError: the discount is not in that range.

    >>> case = projected_dilemma()
    >>> case.losses(torch.zeros(2, dtype=torch.float64))
    tensor([1.5000, 1.5000], dtype=torch.float64)
    """
    discount = _checked(discount)
    weights = 4 * torch.rand(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 2
    habits = torch.tensor([[0.5, 0.75, 0.25, 0.75, 0.25], [0.5, 0.75, 0.75, 0.25, 0.25]], dtype=torch.float64).logit()

    def projected(first: Tensor, second: Tensor) -> Tensor:
        one, other = (weights[i].to(own) * own + habits[i].to(own) for i, own in enumerate((first, second)))
        return _full(one, other, discount) + penalty * (first.square() + second.square())

    return GameCase("projected dilemma", FunctionGame(_two_players(projected)), _logits())


# ---------------------------------------------------------------------------------------------------------------------
# both players' losses as functions of both players' logits


def _two_players(both) -> Losses:
    return {
        "first": lambda values: both(values["first"], values["second"])[0],
        "second": lambda values: both(values["first"], values["second"])[1],
    }


def _logits(*shape: int) -> dict[str, Tensor]:
    return {player: torch.zeros(shape, dtype=torch.float64) for player in ("first", "second")}


def _checked(discount: float) -> float:
    if not 0 <= discount < 1:
        raise InputError(f"discount must be from 0 to below 1, got {discount}; at 1 the game never ends.")
    return discount


def _outcomes(first: Tensor, second: Tensor) -> Tensor:
    """Return the probabilities of CC, CD, DC, DD, from those to cooperate; a new last axis."""
    return torch.stack(
        [first * second, first * (1 - second), (1 - first) * second, (1 - first) * (1 - second)],
        dim=-1,
    )


def _discounted(initial: Tensor, transitions: Tensor, discount: float) -> Tensor:
    """Return −(1 − γ) s_0ᵀ (I − γP)^{-1} r_i of both players."""
    identity = torch.eye(4, dtype=initial.dtype, device=initial.device)
    # Not linalg.solve: its forward-mode derivative is wrong under vmap (seen with torch 2.13).
    visits = initial @ torch.linalg.inv(identity - discount * transitions)
    return -(1 - discount) * (REWARDS.to(visits) @ visits)


def _full(first: Tensor, second: Tensor, discount: float) -> Tensor:
    outcomes = _outcomes(first.sigmoid(), second.sigmoid())
    return _discounted(outcomes[0], outcomes[1:], discount)


def _small(first: Tensor, second: Tensor, discount: float) -> Tensor:
    """Return both losses in closed form, which is many times as fast as the solve and the same to rounding.

    Rewards are linear in who cooperates, r_1 = −2 − [first] + 2 [second], and each looks at the other's last action only:
    x' = f + (p − f) y and y' = f + (q − f) x for the probabilities x, y to cooperate. Their discounted means are two equations.
    """
    p, q = first.sigmoid(), second.sigmoid()
    forgiving, other = p - UNFORGIVING, q - UNFORGIVING
    constant, of_other = UNFORGIVING + (1 - discount) * forgiving, UNFORGIVING + (1 - discount) * other
    determinant = 1 - discount**2 * forgiving * other
    x = (constant + discount * forgiving * of_other) / determinant
    y = (of_other + discount * other * constant) / determinant
    return torch.stack([2 + x - 2 * y, 2 + y - 2 * x])


def _pennies(first: Tensor, second: Tensor) -> Tensor:
    value = (2 * first.sigmoid() - 1) * (2 * second.sigmoid() - 1)
    return torch.stack([value, -value])
