"""The gradient of one step: that of its loss, each player's own in a game, or a direction made of them.

    g_i = ∂L_i/∂θ_i        i the players that move in this step; one player, with all parameters, where there is no game
    d(g, J)                what a direction (extragradient, consensus, …) makes of it

There are two ways to it. `StepGradient.__call__` is autograd's: the leaves that it is given are differentiated by, and may be
again. `StepGradient.pure` is torch.func's: a function without side effects, which can be pushed forward, mapped over many
models, and be evaluated elsewhere by a direction. Both give the same numbers, to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retrograd.directions import Direction
from retrograd.errors import InputError
from retrograd.game import is_game, players_of, turns_of
from retrograd.params import Params
from retrograd.task import weighted_loss, weighted_mean
from retrograd.trajectory.state import StepInputs

Losses = Mapping[str, Tensor]
"""The scalar loss of each player; of ``""`` where there is no game."""

LossesOf = Callable[[Params, Params, StepInputs, Tensor | None], Losses]
"""Maps (parameters, buffers, inputs, weights) to the losses of a step; the buffers are written to as the forward pass does."""

ONE = ""
"""The name of the player where there is no game."""


class StepGradient:
    """g as a function of the losses, and of parameters, buffers, inputs and example weights.

    Args:
        task: what is trained.
        names: the trained parameters.
        group_of: the optimizer group of each.
        direction: what takes the gradient's place.

    Attributes:
        players: the parameters of each player.
        turns: who moves in which step.
    """

    def __init__(self, task: Any, names: tuple[str, ...], group_of: Mapping[str, int], direction: Direction | None):
        self._task, self._group_of, self.direction = type(task).__name__, group_of, direction
        self.players = players_of(task, names) if is_game(task) else {ONE: names}
        self.turns = turns_of(task) if is_game(task) else ((ONE,),)
        self._used: dict[tuple[str, ...], frozenset[str]] = {}  # parameters that get a gradient at all, by who moves

    @property
    def plain(self) -> bool:
        """Whether g is the gradient of one loss, so that its Jacobian is symmetric."""
        return self.direction is None and ONE in self.players

    def refuse_game(self) -> None:
        """Refuse to be taken for the gradient of one loss."""
        if ONE not in self.players:
            raise InputError(
                f"{self._task} is a game: what its examples did is no gradient of one loss. Methods that go through the steps, "
                "Unrolled() and Unrolled(last=K), know what to do."
            )

    def moves(self, names: Sequence[str], step: int) -> bool:
        """Whether any of these parameters is of a player that moves in a step."""
        return any(name in own for own in self.movers(step).values() for name in names)

    def movers(self, step: int) -> dict[str, tuple[str, ...]]:
        """Return who moves in a step, and their parameters."""
        return {player: self.players[player] for player in self.turns[step % len(self.turns)]}

    def __call__(
        self,
        losses_of: LossesOf,
        params: Params,
        buffers: Params,
        inputs: StepInputs,
        weights: Tensor | None,
        create_graph: bool = False,
    ) -> tuple[Params, Tensor]:
        """Return g of the parameters that have one, and the loss, summed over the players that move.

        Args:
            losses_of: gives the losses.
            params: all parameters, as leaves.
            buffers: written to.
            inputs: u_t.
            weights: example weights, or None for ones.
            create_graph: whether g is to be differentiated.
        """
        if self.direction is not None:
            return self._directed(losses_of, params, buffers, inputs, weights, create_graph)
        losses = losses_of(params, buffers, inputs, weights)
        return self._by_autograd(losses, params, inputs.step, create_graph), _total(losses, self.movers(inputs.step))

    def pure(
        self, losses_of: LossesOf, params: Params, buffers: Params, inputs: StepInputs, weights: Tensor | None
    ) -> tuple[Params, Params]:
        """Return g and the buffers after the step; nothing is written to, and zeros stand for gradients that do not exist."""
        field = _Field(losses_of, self.movers(inputs.step), inputs, weights)
        if self.direction is None:
            return field(params, buffers)
        rates = {name: inputs.hyper[self._group_of[name]]["learning_rate"] for name in params}
        return self.direction(field, params, buffers, rates)

    def used(
        self, losses_of: LossesOf, params: Params, buffers: Params, inputs: StepInputs, weights: Tensor | None
    ) -> frozenset[str]:
        """Return the names of the parameters that get a gradient in this step, found once for each turn."""
        turn = self.turns[inputs.step % len(self.turns)]
        if turn not in self._used:
            try:
                leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
            except RuntimeError as error:
                raise InputError(
                    "which parameters have a gradient is found out at the first step, and not inside a transform of "
                    "torch.func: make the step once outside, by calling the update map."
                ) from error
            written = {name: leaf.detach().clone() for name, leaf in buffers.items()}
            self._by_autograd(losses_of(leaves, written, inputs, weights), leaves, inputs.step, create_graph=False)
        return self._used[turn]

    def _by_autograd(self, losses: Losses, params: Params, step: int, create_graph: bool) -> Params:
        """Return the gradients that there are, and note whose they are."""
        grads: Params = {}
        movers = self.movers(step)
        for player, names in movers.items():
            keep = create_graph or player != [*movers][-1]
            own = [params[name] for name in names]
            found = torch.autograd.grad(losses[player], own, create_graph=create_graph, retain_graph=keep, allow_unused=True)
            grads |= {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}
        self._used[tuple(movers)] = frozenset(grads)
        # In the order of the module: the norm of a gradient depends on the order of its parts, by rounding.
        return {name: grads[name] for name in params if name in grads}

    def _directed(
        self,
        losses_of: LossesOf,
        params: Params,
        buffers: Params,
        inputs: StepInputs,
        weights: Tensor | None,
        create_graph: bool,
    ) -> tuple[Params, Tensor]:
        used = self.used(losses_of, params, buffers, inputs, None if weights is None else weights.detach())
        with torch.set_grad_enabled(create_graph):
            grads, after = self.pure(losses_of, params, buffers, inputs, weights)
        with torch.no_grad():
            at = {name: leaf.detach().clone() for name, leaf in buffers.items()}
            loss = _total(losses_of(params, at, inputs, weights), self.movers(inputs.step))
        buffers.update(after)
        return {name: grads[name] for name in params if name in used and name in grads}, loss


class _Field:
    """v of the players that move in one step, as directions ask for it."""

    def __init__(self, losses_of: LossesOf, players: dict[str, tuple[str, ...]], inputs: StepInputs, weights: Tensor | None):
        self._losses_of, self.players, self._inputs, self._weights = losses_of, players, inputs, weights

    def __call__(self, params: Params, buffers: Params) -> tuple[Params, Params]:
        grads, after = {}, buffers
        for player, names in self.players.items():

            def loss(own: Params, player: str = player) -> tuple[Tensor, Params]:
                return self._loss(player, {**params, **own}, buffers)

            found, after = torch.func.grad(loss, has_aux=True)({name: params[name] for name in names})
            grads |= found
        return {name: grads[name] for name in params if name in grads}, after

    def loss(self, player: str, params: Params, buffers: Params) -> Tensor:
        return self._loss(player, params, buffers)[0]

    def _loss(self, player: str, params: Params, buffers: Params) -> tuple[Tensor, Params]:
        written = {name: leaf.clone() for name, leaf in buffers.items()}
        losses = self._losses_of(params, written, self._inputs, self._weights)
        return losses[player], written


def direction_of(optimizer: Any) -> Direction | None:
    """Return the direction that an optimizer of ours steps along by itself, if it does."""
    own: Any = getattr(optimizer, "direction", None)
    return None if own is None else own()


def player_losses(
    task: Any, players: Mapping[str, object], model: nn.Module, batch: Any, weights: Tensor | None, size: int, *more: Any
) -> Losses:
    """Return the losses of a batch of ``size`` examples, one for each player.

    Raises:
        InputError: there is not one for each player, or not one an example.
    """
    if ONE in players:
        return {ONE: weighted_loss(task, model, batch, weights, size, *more)}
    name, coupled = type(task).__name__, hasattr(task, "loss")
    given: Any = torch.ones(size) if weights is None and coupled else weights
    found = task.loss(model, batch, given, *more) if coupled else task.losses(model, batch, *more)
    if not isinstance(found, Mapping) or set(found) != set(players):
        got = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise InputError(f"{name} must give a loss for each of its players, {sorted(players)}; got {got}.")
    if coupled:
        return found
    return {player: weighted_mean(own, weights, size, f"{name}.losses of {player}") for player, own in found.items()}


def _total(losses: Losses, movers: Mapping[str, object]) -> Tensor:
    return torch.stack([losses[player].detach() for player in movers]).sum()
