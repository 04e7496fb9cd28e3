"""May a hypergradient be trusted? Retraining with changed inputs says so.

    error(h) = |(f(z + h d) − f(z − h d)) / 2h − ⟨d f/d z, d⟩| / |⟨d f/d z, d⟩|      d a random direction, in units of z's scale

As a function of h the error is V-shaped: rounding makes it large for small h, curvature for large h. Its minimum is what
counts: one h alone may say that a right gradient is off by half. How far right of the V one can go says for how large a change
of the inputs the gradient is any good; the **metasmoothness** of z along d, from trainings at z, z + hd, z + 2hd with h the
largest size,

    S = Σ_j |Δ_j| sign(θ_j(z + hd) − θ_j(z)) sign(θ_j(z + 2hd) − θ_j(z + hd)) / Σ_j |Δ_j|,     Δ = θ(z + 2hd) − θ(z),

is 1 where parameters go on as they began and near 0 where they jump about: gradients of such runs may be right and useless.

Cost: two trainings for each direction and size, and one more for each direction.

Reference: Engstrom et al. (2025), "Optimizing ML training with metagradient descent", section 4 (metasmoothness).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from retrograd.adjoint import Outcome, Queries
from retrograd.errors import InputError
from retrograd.hypergradients.chain import Chain
from retrograd.hypergradients.result import Hypergradient
from retrograd.hypergradients.variables import data_changes, one_hot_labels, recorded_weights
from retrograd.params import Params, flatten
from retrograd.progress import track
from retrograd.trajectory import Trajectory
from retrograd.trajectory.roughness import SMOOTH_ENOUGH
from retrograd.trajectory.step_inputs import batch_names

SIZES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
AGREES = 0.05  # relative error along a direction, at the best size, up to which a gradient is called right


@dataclass(frozen=True)
class Verdict:
    """What retraining says of a hypergradient.

    Attributes:
        sizes: h, in units of the scale of each input.
        errors: relative error of the directional derivative, [direction, size]; NaN where training diverged.
        predicted: ⟨gradient, d⟩ of each direction.
        actual: the central difference at the best size of each direction.
        metasmoothness: of each direction.
        doubts: what else is known against it (see `Hypergradient.doubts`).
    """

    sizes: tuple[float, ...]
    errors: Tensor
    predicted: Tensor
    actual: Tensor
    metasmoothness: Tensor
    doubts: tuple[str, ...]

    @property
    def error(self) -> float:
        """The largest over directions of the error at the best size."""
        return self.errors.nan_to_num(float("inf")).amin(1).max().item()

    @property
    def smooth(self) -> bool:
        """Whether parameters follow the inputs smoothly enough for finite changes to be predicted."""
        return self.metasmoothness.min().item() >= SMOOTH_ENOUGH

    @property
    def trusted(self) -> bool:
        """Whether the gradient is right, and training smooth enough for it to be of use."""
        return self.error <= AGREES and self.smooth

    def __str__(self) -> str:
        """Say in words whether and how far to trust it, with the V of errors."""
        worst = self.errors.nan_to_num(float("inf")).amax(0).tolist()
        curve = ", ".join(f"{size:g}: {error:.1e}" for size, error in zip(self.sizes, worst, strict=True))
        reach = [size for size, column in zip(self.sizes, self.errors.T, strict=True) if bool((column <= AGREES).all())]
        lines = [
            f"{'trusted' if self.trusted else 'NOT to be trusted'}: the derivative differs from retraining by {self.error:.1e} "
            f"(of its size, at the best h; random directions: {len(self.predicted)})",
            f"largest error for each h: {curve}",
        ]
        if reach:
            lines.append(f"predicts changes of up to {max(reach):g} times the inputs' scale to {AGREES:.0%}")
        lines.append(
            f"metasmoothness {self.metasmoothness.min().item():.2f}: "
            + ("finite changes follow it" if self.smooth else "too rough for finite changes to follow; smooth training first")
        )
        return "\n".join([*lines, *(f"doubt: {doubt}" for doubt in self.doubts)])


def verify(
    run: Trajectory | Chain,
    outcome: Any,
    gradient: Hypergradient,
    *,
    names: Sequence[str] | None = None,
    directions: int = 1,
    sizes: Sequence[float] = SIZES,
    stage: int = 0,
    seed: int = 0,
) -> Verdict:
    """Compare a hypergradient with central differences of retraining, along random directions of all its inputs together.

    Args:
        run: the run (or chain) that it is of.
        outcome: the outcome that it is of; its first question is looked at.
        gradient: what `hypergradient` returned (that of ``stage``, for a chain).
        names: which of its inputs move; all if not given.
        directions: how many random directions.
        sizes: h, in units of the scale of each input: the recorded value of hyperparameters (or what is left to 1 of those
            between ½ and 1, as momentum; 1 for a 0), the recorded weight of an example, the root mean square of a tensor.
        stage: of a chain.
        seed: of the directions.

    Raises:
        InputError: the gradient is not that of this run, or was taken per step.
    """
    if directions < 1 or not sizes or any(size <= 0 for size in sizes):
        raise InputError("verify needs at least one direction, and sizes above 0.")
    own = run.stages[stage] if isinstance(run, Chain) else run
    point = _Point(run, own, stage, tuple(gradient.values if names is None else names))
    generator = torch.Generator().manual_seed(seed)
    asked, sizes = Outcome.of(outcome), tuple(sorted(sizes, reverse=True))
    errors = torch.full((directions, len(sizes)), float("nan"), dtype=torch.float64)
    predicted, actual, smooth = [], [], []
    for row in track(range(directions), "verifying"):
        direction = point.direction(generator)
        slope = gradient.along(direction)[0].item()
        slopes = []
        for column, size in enumerate(sizes):
            sides = [point.value(asked, direction, sign * size) for sign in (1, -1)]
            slopes.append((sides[0] - sides[1]) / (2 * size))
            errors[row, column] = abs(slopes[-1] - slope) / max(abs(slope), torch.finfo(torch.float64).tiny)
        best = int(errors[row].nan_to_num(float("inf")).argmin())
        predicted.append(slope)
        actual.append(slopes[best])
        smooth.append(point.metasmoothness(direction, sizes[0]))
    return Verdict(sizes, errors, torch.tensor(predicted), torch.tensor(actual), torch.tensor(smooth), gradient.doubts)


class _Point:
    """The inputs of one stage, and how to train with others."""

    def __init__(self, run: Trajectory | Chain, own: Trajectory, stage: int, names: tuple[str, ...]):
        self._run, self._own, self._stage, self._names = run, own, stage, names

    def direction(self, generator: torch.Generator) -> dict[str, Any]:
        """Draw a change of all inputs, each in units of its own scale."""

        def normal(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

        found: dict[str, Any] = {}
        for name in self._names:
            at = self._at(name)
            if isinstance(at, dict):
                found[name] = {key: normal(leaf) * _scale(leaf) for key, leaf in at.items()}
            elif name == "example_weights":
                found[name] = normal(at) * at
            else:
                found[name] = normal(at) * (_scale(at) if self._is_data(name) else _room(at))
        if "initial_params" in found and isinstance(self._run, Chain) and self._stage:
            for key in self._run.taken(self._stage).keys() & found["initial_params"].keys():
                found["initial_params"][key].zero_()  # it starts where the stage before it ended
        return found

    def value(self, outcome: "Outcome | Queries", direction: Mapping[str, Any], size: float) -> float:
        """Return the outcome of training with the inputs moved; NaN where training diverges."""
        try:
            moved = self._trained(direction, size)
        except ArithmeticError:
            return float("nan")
        last = moved.stages[-1] if isinstance(moved, Chain) else moved
        return outcome.values(last.update_map, last.final_state).detach().flatten()[0].item()

    def metasmoothness(self, direction: Mapping[str, Any], size: float) -> float:
        """Return S along the direction."""
        try:
            ends = [flatten(self._trained(direction, step * size).final_state.params.values()).double() for step in (0, 1, 2)]
        except ArithmeticError:
            return 0.0
        whole = (ends[2] - ends[0]).abs()
        agree = (ends[1] - ends[0]).sign() * (ends[2] - ends[1]).sign()
        return ((whole * agree).sum() / whole.sum().clamp(min=torch.finfo(torch.float64).tiny)).item()

    def _at(self, name: str) -> Tensor | Params:
        run = self._own
        if name == "meta":
            return run.update_map.meta
        if name == "initial_params":
            return run.state(0).params
        if name == "example_weights":
            return recorded_weights(run)
        if name == "clip_norm":
            return torch.tensor([run.update_map.clip_norm], dtype=torch.float64)
        if self._is_data(name):
            data = run.examples.batch(run.examples.ids)
            place = name if isinstance(data, Mapping) else ("inputs", "labels").index(name)
            tensor = data if isinstance(data, Tensor) else data[place]
            return tensor if tensor.is_floating_point() else one_hot_labels(run, tensor)
        return torch.tensor([float(own[name]) for own in run.records[0].hyper], dtype=torch.float64)

    def _is_data(self, name: str) -> bool:
        return name in batch_names(self._own.inputs(0).batch)

    def _trained(self, direction: Mapping[str, Any], size: float) -> Trajectory | Chain:
        options: dict[str, Any] = {}
        hyper: dict[str, Tensor] = {}
        data: dict[str, Tensor] = {}
        for name in self._names if size else ():
            at: Any = self._at(name)
            change = direction[name]
            if name == "meta":
                options["meta"] = _plus(at, change, size)
            elif name == "initial_params":
                options["initial"] = replace(self._own.state(0), params=_plus(at, change, size))
            elif name == "example_weights":
                options["weights"] = 1 + size * change / torch.where(at == 0, 1, at)  # factors on the recorded ones
            elif name == "clip_norm":
                options["clip_norm"] = (at + size * change).item()
            elif self._is_data(name):
                data[name] = at + size * change
            else:
                recorded = [[float(own[name]) for own in record.hyper] for record in self._own.records]
                hyper[name] = torch.tensor(recorded, dtype=torch.float64) + size * change
        options |= ({"hyper": hyper} if hyper else {}) | (data_changes(self._own, data) if data else {})
        if isinstance(self._run, Chain):
            return self._run.rerun(*(options if number == self._stage else {} for number in range(len(self._run))))
        return self._run.rerun(**options)


def _room(numbers: Tensor) -> Tensor:
    """Scale of hyperparameters: their own size; none is moved across 1 that may not be, as momentum."""
    sizes = torch.where(numbers == 0, 1, numbers.abs())
    return torch.where((numbers > 0.5) & (numbers < 1), 1 - numbers, sizes)


def _scale(leaf: Tensor) -> Tensor:
    size = leaf.square().mean().sqrt()
    return size if size > 0 else torch.ones_like(size)


def _plus(at: Any, change: Any, size: float) -> Params:
    return {name: leaf + size * change[name] for name, leaf in at.items()}
