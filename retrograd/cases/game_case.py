"""A game with known answers, as a game to record and as a map of one flat vector.

    g(w) = [∂L_1/∂w_1; …; ∂L_n/∂w_n]                         the game gradient
    F(w) = w − α g(w)                                         simultaneous descent
    F(w) = w − α g(w − α g(w))                                extragradient

w          the players' parameters, one after the other, [dim];
L_i        player i's loss, a function of everybody's parameters;
α          learning rate.

Training the game through an update map gives the same numbers (``tests/test_cases_of_games.py``) and records them; F is for
sweeps over thousands of starts, where the overhead of a call is all there is: ``torch.func.vmap`` makes one call of many. This
is the one place where F is built.

Cost: a game gradient is one reverse pass a player; extragradient takes two game gradients a step.

Reference: Lorraine et al. (2022), "Lyapunov exponents for diversity in differentiable games", arXiv 2112.14570.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.errors import InputError
from retrograd.game import FunctionGame
from retrograd.params import Params, flatten, unflatten

Losses = Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]]
Method = Literal["simultaneous", "extragradient"]


@dataclass(frozen=True)
class GameCase:
    """A game, a point of it, and what is known of where training can end.

    Attributes:
        name: of the case.
        game: the game, to be trained as any other task.
        start: one tensor a player: where the game is usually begun, or its shapes.
        solutions: the losses at known ends of training, by name; `classify` uses them.

    >>> from retrograd.cases import dirac_gan
    >>> case = dirac_gan()
    >>> point = torch.tensor([1.0, 0.0])
    >>> case.gradient(point)                                   # y / (1 + e^{xy}) and −x / (1 + e^{xy})
    tensor([ 0.0000, -0.5000])
    >>> case.operator("simultaneous", learning_rate=0.5)(point)
    tensor([1.0000, 0.2500])
    """

    name: str
    game: FunctionGame
    start: Params
    solutions: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def players(self) -> tuple[str, ...]:
        """The players' names, in the order of their parameters in a vector."""
        return tuple(self.start)

    @property
    def dim(self) -> int:
        """Number of parameters of all players together."""
        return sum(leaf.numel() for leaf in self.start.values())

    def flatten(self, values: Mapping[str, Tensor]) -> Float[Tensor, " dim"]:
        """Return the players' tensors as one vector."""
        return flatten(values[player] for player in self.players)

    def unflatten(self, vector: Float[Tensor, "*start dim"]) -> Params:
        """Undo `flatten`; a leading axis is kept."""
        return unflatten(vector, self.start)

    def starts(self, count: int, seed: int, scale: float = 1.0) -> Float[Tensor, "count dim"]:
        """Return random starts: every parameter normal with standard deviation ``scale`` (for dilemmas these are logits).

        >>> from retrograd.cases import dirac_gan
        >>> tuple(dirac_gan().starts(5, seed=0).shape)
        (5, 2)
        """
        generator = torch.Generator().manual_seed(seed)
        return scale * torch.randn(count, self.dim, generator=generator, dtype=torch.float64)

    def losses(self, vector: Float[Tensor, " dim"]) -> Float[Tensor, " player"]:
        """Return every player's loss; open to torch.func."""
        values = self.unflatten(vector)
        return torch.stack([self.game.functions[player](values) for player in self.players])

    def gradient(self, vector: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """Return the game gradient g(w); open to torch.func."""
        values = self.unflatten(vector)

        def slope(player: str) -> Tensor:
            function = self.game.functions[player]
            return torch.func.grad(lambda own: function({**values, player: own}))(values[player])

        return flatten(slope(player) for player in self.players)

    def jacobian(self, vector: Float[Tensor, " dim"]) -> Float[Tensor, "dim dim"]:
        """Return J = ∂g/∂w, dense."""
        return torch.func.jacfwd(self.gradient)(vector)  # pyright: ignore[reportReturnType]

    def operator(self, method: Method, learning_rate: float) -> Callable[[Tensor], Tensor]:
        """Return F, one step of training, as a function of the vector; open to torch.func.

        Args:
            method: ``"simultaneous"`` descent, or ``"extragradient"``.
            learning_rate: α.

        Raises:
            InputError: the method is not known, or the learning rate not positive.
        """
        if method not in get_args(Method):
            raise InputError(f"method must be one of {get_args(Method)}, got {method!r}.")
        if not learning_rate > 0:
            raise InputError(f"learning_rate must be positive, got {learning_rate}.")

        def simultaneous(vector: Tensor) -> Tensor:
            return vector - learning_rate * self.gradient(vector)

        def extragradient(vector: Tensor) -> Tensor:
            return vector - learning_rate * self.gradient(simultaneous(vector))

        return simultaneous if method == "simultaneous" else extragradient

    def classify(self, vectors: Float[Tensor, "start dim"], tolerance: float = 0.05) -> list[str | None]:
        """Return, for each vector, the known solution whose losses it has; None where it has those of none.

        Args:
            vectors: points, such as ends of training.
            tolerance: largest difference of any player's loss.

        Raises:
            InputError: no solutions of this case are known.
        """
        if not self.solutions:
            raise InputError(f"of {self.name} no solutions are known. Compare the vectors themselves.")
        names, losses = list(self.solutions), torch.func.vmap(self.losses)(vectors)
        known = torch.tensor(list(self.solutions.values()), dtype=losses.dtype)
        distances = (losses[:, None] - known).abs().amax(-1)
        return [names[int(row.argmin())] if row.min() <= tolerance else None for row in distances]

    def same(self, first: Float[Tensor, " dim"], second: Float[Tensor, " dim"], tolerance: float = 0.05) -> bool:
        """Whether all players' losses at two points differ by at most ``tolerance``: for logits, distances say little.

        >>> from retrograd.cases import small_dilemma
        >>> small_dilemma().same(torch.tensor([7.0, 7.0]), torch.tensor([20.0, 9.0]))
        True
        """
        return bool(((self.losses(first) - self.losses(second)).abs() <= tolerance).all())
