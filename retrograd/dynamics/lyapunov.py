"""Lyapunov exponents: how fast nearby trainings drift apart, over a recorded run or any sequence of maps.

    Q_0 orthonormal,  A_t Q_tᵀ = Q_{t+1}ᵀ R_t         λ_i = (1/k) Σ_t log (R_t)_ii        (Benettin)
    M_k = A_{k−1} … A_0 = U Σ Vᵀ                      λ_i = (1/k) log σ_i                 (finite time)

λ          growth per step, natural logarithm; ×2 with ``squared``, for growth of the squared length, as in (2) below; divide by
           dt for a flow that is stepped by dt. Positive: nearby states part; Σ_i λ_i = mean of log |det A_t|, over all i;
Q, R       an orthonormal frame that is carried along (rows here), and what it grew by; made orthonormal again in float64;
σ, u, v    singular values of k steps together: what leaves s_0 along v_i arrives along u_i, σ_i times as long.

The first tends to the exponents of Oseledets as k grows; the second says what these k steps do, and which direction at the
start matters most. Both are differentiable in the start, by reverse mode over the forward products (`top_exponents`).

Assumptions: as in ``flow.py``; float64 for more than some hundred steps. A direction that a map forgets has the exponent −∞.
Singular values below rounding of the largest (exponents further apart than 36 / k in float64) are lost in the finite-time form;
frames lose nothing. A gradient of exponents far from the first is as ill-conditioned as the singular vectors behind it.
Cost: Benettin one push of ``count`` tangents and 4 count² dim operations a step; memory count · dim. Finite time: dim tangents
up to `DENSE` dimensions, else ``count + 4`` tangents forward and back an iteration. Gradients keep the graph of all k steps.

References: (1) Benettin, Galgani, Giorgilli, Strelcyn (1980), "Lyapunov characteristic exponents for smooth dynamical systems";
(2) Lorraine et al. (2022), "Lyapunov exponents for diversity in differentiable games", arXiv 2112.14570.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.dynamics.flow import Flow, check_step, flow_of, push_in_slices, push_with_graph, start_of
from retrograd.errors import InputError, NonFinite
from retrograd.linalg import orthonormalise
from retrograd.progress import track
from retrograd.trajectory.roughness import AMPLIFICATION_LIMIT

DENSE = 256
"""Up to so many dimensions the finite-time form multiplies all matrices out."""
_SPARE = 4  # tangents beyond those asked for: they make block iteration converge

Objective = Literal["max", "min", "sum", "entropy"]


@dataclass(frozen=True)
class LyapunovExponents:
    """Exponents along a trajectory.

    Attributes:
        exponents: λ, per step, the largest first; with a leading axis ``start`` if many were asked for.
        growth: log growth per step in each interval, ``[interval, *start, count]``: its mean, weighted by ``lengths``, is λ.
        lengths: steps of each interval, ``[interval]``.
        first: number of the step at which the first interval begins.
        frame: the orthonormal tangents at the end, ``[*start, count, dim]``.
        final_state: the state at the end.
        squared: whether growth is that of the squared length.
    """

    exponents: Float[Tensor, "... count"]
    growth: Float[Tensor, "interval ... count"]
    lengths: Float[Tensor, " interval"]
    first: int
    frame: Float[Tensor, "... count dim"]
    final_state: Float[Tensor, "... dim"]
    squared: bool = False

    @property
    def history(self) -> Float[Tensor, "interval ... count"]:
        """The exponents as they would be, had one stopped after each interval."""
        weights = self.lengths.reshape(-1, *[1] * (self.growth.dim() - 1))
        return (self.growth * weights).cumsum(0) / weights.cumsum(0)

    @property
    def amplification(self) -> Float[Tensor, "..."]:
        """How many times longer the first tangent is at the end: what `roughness` measures with two trainings."""
        total = self.exponents[..., 0] * self.lengths.sum()
        return torch.exp(total / 2 if self.squared else total)

    def windowed(self, window: int | None = None) -> Float[Tensor, "place ..."]:
        """Return the top exponent over ``window`` intervals, one after the other; None: a tenth of them, at least 5."""
        window = self._window(window)
        weights = self.lengths.reshape(-1, *[1] * (self.growth.dim() - 2))
        sums = (self.growth[..., 0] * weights).unfold(0, window, 1).sum(-1)
        return sums / weights.unfold(0, window, 1).sum(-1)

    def chaotic_from(self, window: int | None = None, threshold: float = 0.0) -> int | None:
        """Return the step from which the top exponent, over ``window`` intervals, stays above ``threshold``, or None.

        Args:
            window: intervals to average over; None: a tenth of them, at least 5.
            threshold: growth per step that does not count yet.

        Raises:
            InputError: the exponents are of many starts, or the window is longer than the run.
        """
        if self.growth.dim() > 2:
            raise InputError("these are the exponents of many starts. Ask for those of one.")
        low = (self.windowed(window) <= threshold).nonzero()
        place = 0 if len(low) == 0 else int(low[-1]) + 1
        if place > len(self.growth) - self._window(window):
            return None
        return self.first + int(self.lengths[:place].sum())

    def __str__(self) -> str:
        """Give the exponents, and whether and from when on nearby trainings part."""
        if self.exponents.dim() > 1:
            return f"exponents of {self.exponents.shape[:-1].numel()} starts, on average {_numbers(self.exponents.mean(0))}"
        since, grown = self.chaotic_from(), self.amplification.item()
        found = f"exponents {_numbers(self.exponents)} per step; differences grow {grown:.3g}-fold"
        return found if since is None or grown <= AMPLIFICATION_LIMIT else f"{found}, steadily from step {since} on"

    def _window(self, window: int | None) -> int:
        intervals = len(self.growth)
        window = min(max(intervals // 10, 5), intervals) if window is None else window
        if not 1 <= window <= intervals:
            raise InputError(f"window must be between 1 and {intervals}, the number of intervals, got {window}.")
        return window


def lyapunov_exponents(
    run_or_map: object,
    state: Float[Tensor, "*start dim"] | None = None,
    steps: int | None = None,
    count: int | None = None,
    *,
    step: int = 0,
    every: int = 1,
    discard: int = 0,
    squared: bool = False,
    seed: int = 0,
) -> LyapunovExponents:
    """Return the Lyapunov exponents of a recorded run with its own batches, or of any flow.

    Args:
        run_or_map: a recorded run, a flow, or a function of a vector.
        state: where to start; None: where the run was before ``step``. ``[start, dim]`` for many starts of a `FunctionFlow`.
        steps: how many steps; None: to the end of the run.
        count: how many exponents; None: all of them up to 16 dimensions, beyond that 1.
        step: number of the first step.
        every: steps between two orthonormalisations; more save time where growth is slow.
        discard: how many of the steps are made, but not counted: the frame then has turned to where it belongs.
        squared: whether growth of the squared length is meant, which doubles all exponents.
        seed: seed of the frame to start with, where it is not all of space.

    Returns:
        The exponents and how they came about; `LyapunovExponents.chaotic_from` says from which step on training is chaotic.

    Raises:
        InputError: a number is out of range, or something is missing.
        NotRecorded: the run is shorter.
        NonFinite: a state or tangent became non-finite.

    A map that doubles one number, halves another and exchanges nothing:

    >>> scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
    >>> found = lyapunov_exponents(lambda state: scale * state, torch.ones(2, dtype=torch.float64), steps=60)
    >>> (found.exponents / torch.log(torch.tensor(2.0))).round(decimals=3)
    tensor([ 1., -1.], dtype=torch.float64)
    >>> found.chaotic_from()
    0
    """
    flow = flow_of(run_or_map, None if state is None else state.shape[-1])
    state = start_of(flow, state, step).detach()
    steps = _steps(flow, steps, step)
    count = (flow.dim if flow.dim <= 16 else 1) if count is None else count
    if not 1 <= count <= flow.dim or every < 1 or not 0 <= discard < steps:
        raise InputError(
            f"count must be between 1 and {flow.dim}, the length of a state, every at least 1, and discard between 0 and "
            f"{steps - 1}, the number of steps less one; got {count}, {every} and {discard}."
        )
    frame = _frame(count, state, seed)
    logs, lengths, pending = [], [], 0
    for current in track(range(step, step + steps), "Lyapunov exponents"):
        state, frame = push_in_slices(flow, current, state, frame)
        pending += 1
        done = current + 1 - step
        if pending < every and done not in (discard, steps):
            continue
        _check_finite(state, frame, current)
        frame, upper = orthonormalise(frame)
        pending, length = 0, pending
        if done <= discard:
            continue
        lengths.append(length)
        logs.append(upper.diagonal(dim1=-2, dim2=-1).log() / lengths[-1])
    growth = torch.stack(logs) * (2 if squared else 1)
    weights = torch.tensor(lengths, dtype=growth.dtype, device=growth.device)
    exponents = torch.tensordot(weights, growth, 1) / (steps - discard)
    order = exponents.argsort(dim=-1, descending=True, stable=True)  # a frame finds them in order but for noise
    growth = growth.take_along_dim(order.expand_as(growth), -1)
    frame = frame.take_along_dim(order[..., None], -2)
    return LyapunovExponents(exponents.take_along_dim(order, -1), growth, weights, step + discard, frame, state, squared)


@dataclass(frozen=True)
class FiniteTimeExponents:
    """Singular values of k steps together, and their directions.

    Attributes:
        exponents: (1/k) log σ, the largest first.
        right: unit vectors v at the start, as rows.
        left: unit vectors u at the end, as rows.
        residual: ‖M_kᵀ u − σ v‖ / σ_1, the largest; where the matrices were multiplied out that is rounding.
        squared: whether exponents are those of the squared length.
    """

    exponents: Float[Tensor, " count"]
    right: Float[Tensor, "count dim"]
    left: Float[Tensor, "count dim"]
    residual: float
    squared: bool = False


def finite_time_exponents(
    flow: object,
    state: Float[Tensor, " dim"] | None,
    steps: int,
    count: int = 1,
    *,
    step: int = 0,
    squared: bool = False,
    dense: bool | None = None,
    iterations: int = 50,
    tolerance: float = 1e-8,
    seed: int = 0,
) -> FiniteTimeExponents:
    """Return the largest singular values of k steps from here, as exponents, with both their directions.

    Args:
        flow: a recorded run, a flow, or a function of a vector.
        state: s at ``step``; None: that of the recorded run.
        steps: k.
        count: how many.
        step: number of the first step.
        squared: whether exponents are doubled, as those of the squared length.
        dense: whether to multiply the matrices out; None: up to `DENSE` dimensions. If not: block iteration, forward and back.
        iterations: of block iteration at most.
        tolerance: the residual at which it ends.
        seed: seed of the block it starts with.

    Raises:
        InputError: a number is out of range.
        NonFinite: a state or a product is not finite.

    >>> shear = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    >>> found = finite_time_exponents(lambda state: shear @ state, torch.zeros(2, dtype=torch.float64), steps=3, count=2)
    >>> values = torch.linalg.svdvals(torch.linalg.matrix_power(shear, 3)).log() / 3
    >>> torch.allclose(found.exponents, values)
    True
    """
    flow = flow_of(flow, None if state is None else state.shape[-1])
    state = start_of(flow, state, step).detach()
    _steps(flow, steps, step)
    if not 1 <= count <= flow.dim:
        raise InputError(f"count must be between 1 and {flow.dim}, the length of a state, got {count}.")
    dense = flow.dim <= DENSE if dense is None else dense
    factor = (2 if squared else 1) / steps
    states = [state]

    def forward(rows: Tensor) -> Tensor:
        own = state
        for current in range(step, step + steps):
            own, rows = push_in_slices(flow, current, own, rows)
            _check_finite(own, rows, current)
            if len(states) <= steps:
                states.append(own)
        return rows

    if dense:
        arrived = forward(torch.eye(flow.dim, dtype=torch.float64, device=state.device))
        right, values, left = torch.linalg.svd(arrived)
        residual = ((left @ arrived.T)[:count] - values[:count, None] * right.T[:count]).norm(dim=1).max() / values[0]
        return FiniteTimeExponents(factor * values[:count].log(), right.T[:count], left[:count], residual.item(), squared)

    rows = _frame(min(count + _SPARE, flow.dim), state, seed)
    values, left, residual = state.new_zeros(count), rows, float("inf")
    for _ in track(range(iterations), "block iteration"):
        arrived = forward(rows)
        turn, values, left = torch.linalg.svd(arrived, full_matrices=False)
        rows, back = turn.T @ rows, left
        for current in reversed(range(step, step + steps)):
            back = flow.pull(current, states[current - step], back)
        residual = ((back - values[:, None] * rows)[:count].norm(dim=1).max() / values[0]).item()
        if residual <= tolerance:
            break
        rows = orthonormalise(back)[0]
    return FiniteTimeExponents(factor * values[:count].log(), rows[:count], left[:count], residual, squared)


def top_exponents(
    flow: object,
    state: Float[Tensor, "*start dim"],
    steps: int,
    count: int = 1,
    *,
    step: int = 0,
    kind: Literal["singular", "frame"] = "singular",
    squared: bool = False,
    frame: Float[Tensor, "count dim"] | None = None,
    seed: int = 0,
) -> Float[Tensor, "*start count"]:
    """Return the largest exponents of k steps, differentiable in ``state``: reverse mode over forward products.

    Args:
        flow: a recorded run, a flow, or a function of a vector.
        state: where to start, ``[dim]``; ``[start, dim]`` for many starts of a `FunctionFlow`.
        steps: k.
        count: how many.
        step: number of the first step.
        kind: ``"singular"``: (1/k) log σ_i(M_k). ``"frame"``: (1/k) Σ log R_ii of a fixed frame that is carried along.
        squared: whether exponents are doubled, as those of the squared length.
        frame: orthonormal rows to carry along, for ``"frame"``; None: random ones, or unit vectors if ``count`` is ``dim``.
        seed: seed of random rows.

    Returns:
        The exponents, the largest first for ``"singular"``, in the order of the rows for ``"frame"``.

    Raises:
        InputError: a number is out of range, or ``frame`` has another shape.
        NonFinite: a state or a product is not finite.

    The growth of x ↦ x² in one step is 2x, and d log(2x) / dx = 1 / x:

    >>> at = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    >>> torch.autograd.grad(top_exponents(torch.square, at, steps=1).sum(), at)
    (tensor([0.2500], dtype=torch.float64),)
    """
    flow = flow_of(flow, state.shape[-1])
    start_of(flow, state, step)
    _steps(flow, steps, step)
    if not 1 <= count <= flow.dim or kind not in ("singular", "frame"):
        raise InputError(
            f'count must be between 1 and {flow.dim}, the length of a state, and kind "singular" or "frame"; got {count} and '
            f"{kind!r}."
        )
    if kind == "singular":
        # dσ = uᵀ dM v: with v held fixed the length of M v has the derivative of σ.
        rows = _right_vectors(flow, state, steps, count, step)
    elif frame is None:
        rows = _frame(count, state, seed)
    elif frame.shape != (count, flow.dim):
        raise InputError(f"frame must be {count} rows of {flow.dim} numbers, got shape {tuple(frame.shape)}.")
    else:
        rows = frame.expand(*state.shape[:-1], count, flow.dim)
    total = rows.new_zeros(rows.shape[:-1])
    rows = rows.to(state)
    for current in range(step, step + steps):
        check_step(flow, current)
        state, rows = push_with_graph(flow, current, state, rows)
        _check_finite(state, rows, current)
        # Scales are constants that cancel: they only keep numbers in range.
        if kind == "singular":
            scale = torch.linalg.vector_norm(rows.detach(), dim=-1)
            total, rows = total + scale.log(), rows / scale[..., None]
        else:
            columns, upper = torch.linalg.qr(rows.mT)
            total, rows = total + upper.diagonal(dim1=-2, dim2=-1).abs().log(), columns.mT
    if kind == "singular":
        total = total + torch.linalg.vector_norm(rows, dim=-1).log()
    return total * ((2 if squared else 1) / steps)


def exponent_objective(exponents: Float[Tensor, "*start count"], objective: Objective = "min") -> Float[Tensor, "*start"]:
    """Return one number to raise from the largest exponents of a state.

    Args:
        exponents: as `top_exponents` returns them.
        objective: ``"max"``: the largest, so that some direction parts; ``"min"``: the smallest of those given, so that all of
            them do; ``"sum"``: all; ``"entropy"``: the sum of the positive ones (Pesin).

    Raises:
        InputError: there is no such objective.

    >>> exponent_objective(torch.tensor([2.0, 1.0, -4.0]), "entropy")
    tensor(3.)
    """
    match objective:
        case "max":
            return exponents.amax(-1)
        case "min":
            return exponents.amin(-1)
        case "sum":
            return exponents.sum(-1)
        case "entropy":
            return exponents.clamp(min=0).sum(-1)
    raise InputError(f'objective must be "max", "min", "sum" or "entropy", got {objective!r}.')


def _right_vectors(flow: Flow, state: Tensor, steps: int, count: int, step: int) -> Tensor:
    """Return the first right singular vectors of k steps, ``[*start, count, dim]``, without a graph."""
    if state.dim() == 1:
        return finite_time_exponents(flow, state.detach(), steps, count, step=step).right
    own = state.detach()
    rows = torch.eye(flow.dim, dtype=own.dtype, device=own.device).expand(*own.shape[:-1], -1, -1)
    for current in range(step, step + steps):
        own, rows = flow.push(current, own, rows)
        _check_finite(own, rows, current)
    return torch.linalg.svd(rows)[0].mT[..., :count, :]


def _steps(flow: Flow, steps: int | None, step: int) -> int:
    if steps is None:
        if flow.steps is None:
            raise InputError("this flow has no end. Give steps.")
        steps = flow.steps - step
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}.")
    check_step(flow, step)
    check_step(flow, step + steps - 1)
    return steps


def _frame(count: int, state: Tensor, seed: int) -> Tensor:
    """Return orthonormal rows ``[*start, count, dim]`` in float64, the same for all starts."""
    dim = state.shape[-1]
    if count == dim:
        rows = torch.eye(dim, dtype=torch.float64)
    else:
        generator = torch.Generator().manual_seed(seed)
        rows = orthonormalise(torch.randn(count, dim, generator=generator, dtype=torch.float64))[0]
    return rows.to(state.device).expand(*state.shape[:-1], count, dim)


def _check_finite(state: Tensor, rows: Tensor, step: int) -> None:
    if not (state.isfinite().all() and rows.isfinite().all()):
        raise NonFinite(
            f"the state or its tangents are not finite after step {step}. Start elsewhere, take fewer steps, or compute in "
            "float64."
        )


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.tolist())
