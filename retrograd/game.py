"""Several players on one model, each with a loss of its own that depends on everybody's parameters.

    g_i(w) = ∂L_i/∂w_i            the game gradient: each player's own slope
    J = ∂g/∂w                     its Jacobian, in general not symmetric: training may turn in circles

A game is a task whose ``losses`` give one vector for each player, and which says whose parameters are whose::

    class GAN:
        players = {"discriminator": "critic", "generator": "maker"}     # names of submodules, or of single parameters
        turns = ("discriminator", "generator")                          # leave it out, and all move at once

        def losses(self, model, batch):
            made = model.maker(torch.randn(len(batch), 16))
            real, fake = model.critic(batch), model.critic(made)
            return {
                "discriminator": F.softplus(-real) + F.softplus(fake),  # one loss per example, not reduced
                "generator": F.softplus(-fake),
            }

        def measurements(self, model, batch):
            return model.critic(batch)

The players are parts of one module, so that a run of a game is recorded, replayed and differentiated as any other.

**Turns.** Step t is that of ``turns[t mod n]``: a name, or a tuple of names that move together. Who does not move keeps its
parameters and slots. An ordinary loop over a discriminator's and a generator's optimizer takes one step of the record for
each ``optimizer.step()``, and has to keep to the order of the turns.

**Losses that couple examples** give ``loss(model, batch, weights)`` instead, a mapping from players to scalars. Both may draw
random numbers, and an ordinary loop has to draw the same ones in the same order. With ``losses``, a weight of 0 takes an
example out of everybody's loss.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retrograd.errors import InputError

Turn = str | Sequence[str]


@runtime_checkable
class Game(Protocol):
    """A task with several players. ``turns``, a sequence of names or tuples of names, is optional."""

    players: Mapping[str, str | Sequence[str]]
    """Each player's submodules or parameters, by name; every trained parameter belongs to exactly one player."""

    def losses(self, model: nn.Module, batch: Any, /) -> Mapping[str, Float[Tensor, " batch"]]:
        """Return one loss per example for each player, not reduced."""
        ...

    def measurements(self, model: nn.Module, batch: Any, /) -> Float[Tensor, " query"]:
        """Return one number per query of ``batch``."""
        ...


@runtime_checkable
class CoupledGame(Protocol):
    """A game whose losses couple the examples of a batch."""

    players: Mapping[str, str | Sequence[str]]
    """As in `Game`."""

    def loss(self, model: nn.Module, batch: Any, weights: Float[Tensor, " batch"], /) -> Mapping[str, Float[Tensor, ""]]:
        """Return the scalar loss of each player."""
        ...

    def measurements(self, model: nn.Module, batch: Any, /) -> Float[Tensor, " query"]:
        """Return one number per query of ``batch``."""
        ...


AnyGame = Game | CoupledGame
"""A task with players."""


def is_game(task: Any) -> TypeGuard[AnyGame]:
    """Whether a task has players."""
    return isinstance(task, Game | CoupledGame)


def players_of(game: AnyGame, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the parameters of each player.

    Args:
        game: the game.
        names: names of all trained parameters.

    Raises:
        InputError: a parameter has no player or two, or a player has no parameters.

    >>> game = FunctionGame({"x": lambda w: w["x"] * w["y"], "y": lambda w: -w["x"] * w["y"]})
    >>> players_of(game, ["x", "y"])
    {'x': ('x',), 'y': ('y',)}
    """
    roots = {player: (own,) if isinstance(own, str) else tuple(own) for player, own in game.players.items()}
    found: dict[str, tuple[str, ...]] = {
        player: tuple(name for name in names if any(name == root or name.startswith(root + ".") for root in own))
        for player, own in roots.items()
    }
    owners = {name: [player for player, own in found.items() if name in own] for name in names}
    wrong = {name: own for name, own in owners.items() if len(own) != 1}
    if wrong:
        name, own = next(iter(wrong.items()))
        raise InputError(
            f"every trained parameter must belong to exactly one player; {name} belongs to {own or 'none'} of {dict(roots)}."
        )
    idle = [player for player, own in found.items() if not own]
    if idle:
        raise InputError(f"player {idle[0]} trains nothing: no trained parameter lies in {roots[idle[0]]}.")
    return found


def turns_of(game: AnyGame) -> tuple[tuple[str, ...], ...]:
    """Return who moves in which step; a single turn of all players if the game has no ``turns``.

    Raises:
        InputError: a turn names no player.
    """
    given: Sequence[Turn] | None = getattr(game, "turns", None)
    if given is None:
        return (tuple(game.players),)
    turns = tuple((turn,) if isinstance(turn, str) else tuple(turn) for turn in given)
    unknown = {player for turn in turns for player in turn} - set(game.players)
    if unknown or not turns or not all(turns):
        raise InputError(f"turns must name players, of {list(game.players)}, at least one a turn; got {given}.")
    return turns


# ---------------------------------------------------------------------------------------------------------------------
# games given by formulas


class FunctionGame:
    """A game without data: one tensor a player, and losses that are functions of all of them.

    Args:
        losses: for each player a function of ``{player: tensor}`` that gives its loss, a scalar.
        turns: who moves in which step; all at once if not given.

    Record it on a data set of one row, which it does not look at: ``record(game.profile(start), torch.zeros(1), game,
    optimizer=..., order=torch.zeros(steps, 1, dtype=torch.int64))``.

    >>> game = FunctionGame({"x": lambda w: w["x"] * w["y"], "y": lambda w: -w["x"] * w["y"]})
    >>> model = game.profile({"x": torch.tensor(2.0), "y": torch.tensor(3.0)})
    >>> {player: loss.item() for player, loss in game.losses(model, torch.zeros(1)).items()}
    {'x': 6.0, 'y': -6.0}
    """

    def __init__(self, losses: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]], turns: Sequence[Turn] | None = None):
        self.functions = dict(losses)
        self.players = {player: player for player in losses}
        if turns is not None:
            self.turns = tuple(turns)

    def profile(self, start: Mapping[str, Tensor]) -> nn.Module:
        """Return a module that holds the players' tensors.

        Raises:
            InputError: players are missing or unknown.
        """
        if set(start) != set(self.players):
            raise InputError(f"the start needs a tensor for each player, {list(self.players)}; got {list(start)}.")
        return nn.ParameterDict({player: nn.Parameter(start[player].detach().clone()) for player in self.players})

    def losses(self, model: Any, batch: Any) -> dict[str, Float[Tensor, " batch"]]:
        """Return each player's loss, the same for every example."""
        everybody = {player: model[player] for player in self.players}
        return {player: function(everybody).reshape(1).expand(len(batch)) for player, function in self.functions.items()}

    def measurements(self, model: Any, batch: Any) -> Float[Tensor, " query"]:
        """Return the losses of all players, in their order, as queries."""
        return torch.cat([loss[:1] for loss in self.losses(model, batch).values()])
