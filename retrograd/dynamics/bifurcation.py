"""Where training branches: climb to a point from which neighbours part, and leave it both ways.

    w ← w + Adam( ∂/∂w  f(λ_k(w)) )                                           find a bifurcation
    M_k = J_{k−1} … J_0,   M_k v_i = σ_i u_i,   λ_k,i = (1/k) log σ_i           how neighbours part in k steps
    w ± ε d,  then F, T times                                                 branch

F          one step of training, J its Jacobian, at the states that F passes through from w;
f          the largest exponent (``"max"``), the smallest of ``count`` (``"min"``: all directions must part), their sum, or the
           sum of the positive ones (``"entropy"``), as in `exponent_objective`; or ``"finite_size"``, the same for neighbours
           at the distance ε: (1/k) log( ‖F^k(w + εv) − F^k(w − εv)‖ / 2ε ) with v = v_1;
d          right singular vectors v_i of M_k, of which the first is the direction that neighbours part in fastest
           (``"singular"``); or eigenvectors of J, Re and Im of a complex one as two directions (``"eigen"``).

The gradient is exact, by reverse mode over forward products; v is a constant in it, as dσ = uᵀ dM v.

Assumptions, and where it fails: an exponent is large where neighbours part *for k steps*, which need not be where they part for
good. Between attractors that are reached slowly (k · log of the growth rate at the separatrix about 1 or below) the largest
exponent sits where growth is transient, off the separatrix, and climbing to it can be worse than not climbing at all. Take k
larger, or the finite-size objective, and compare with not climbing: `generalised_ridge_rider` does all three. The entropy has
no gradient where no exponent is positive.
Cost: the exponents of one ascent step take k steps of F and their Jacobians, about four times that with the gradient, and
memory for the graph of all k steps. Many starts of a `FunctionFlow` cost about as much as one.

Reference: Lorraine et al. (2022), "Lyapunov exponents for diversity in differentiable games", arXiv 2112.14570.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.dynamics.flow import Flow, FunctionFlow, StepFlow, check_step
from retrograd.dynamics.lyapunov import exponent_objective, finite_time_exponents, top_exponents
from retrograd.dynamics.spectrum import spectrum
from retrograd.errors import InputError, NonFinite
from retrograd.progress import track

BifurcationObjective = Literal["max", "min", "sum", "entropy", "finite_size"]
Directions = Literal["singular", "eigen"]
_TOGETHER = 32  # up to so many dimensions the Jacobians of all steps are formed, in one call


@dataclass(frozen=True)
class Bifurcation:
    """Where the ascent of an objective led, one row a start.

    Attributes:
        points: w* at its end.
        values: the objective there.
        values_before: the objective at the start.
        exponents: (1/k) log σ_i at the points, the largest first; not squared.
        directions: v_i at the points, unit vectors as rows.
        path: all points from the start on, ``[ascent_steps + 1, start, dim]``.
    """

    points: Float[Tensor, "start dim"]
    values: Float[Tensor, " start"]
    values_before: Float[Tensor, " start"]
    exponents: Float[Tensor, "start count"]
    directions: Float[Tensor, "start count dim"]
    path: Float[Tensor, "place start dim"]


@dataclass(frozen=True)
class Branches:
    """Where branches led. The axis ``sign`` has + first; ``size`` runs over the values of ε.

    Attributes:
        points: what they left.
        directions: unit vectors along which they left.
        epsilons: how far at first.
        ends: where they were after all steps.
        halfway: where they were after half of them: what still moves has not arrived.
        paths: the states on the way, at even distances, from the branch point's neighbours to the ends, or None.
    """

    points: Float[Tensor, "start dim"]
    directions: Float[Tensor, "start count dim"]
    epsilons: tuple[float, ...]
    ends: Float[Tensor, "start count size sign dim"]
    halfway: Float[Tensor, "start count size sign dim"]
    paths: Float[Tensor, "place start count size sign dim"] | None = None


def find_bifurcation(
    flow: Flow,
    start: Float[Tensor, "*start dim"],
    steps: int,
    *,
    objective: BifurcationObjective = "max",
    count: int = 1,
    epsilon: float = 0.5,
    ascent_steps: int = 40,
    learning_rate: float = 0.1,
    step: int = 0,
) -> Bifurcation:
    """Climb to where neighbours part.

    Args:
        flow: the maps; for a game best a `FunctionFlow` of its operator, as many starts then cost as much as one.
        start: one state, or many.
        steps: k, over which neighbours are to part.
        objective: what to climb; see above.
        count: how many exponents it is made of.
        epsilon: distance of the neighbours, for ``"finite_size"`` only.
        ascent_steps: of Adam.
        learning_rate: of Adam, in units of the state.
        step: number of the flow's first step.

    Raises:
        InputError: a number is out of range, or there is no such objective.
        NonFinite: a state, a product or a gradient is not finite.

    x + .3 sin x turns away from 0 and towards ±π; its slope, e^λ, is largest at 0:

    >>> flow = FunctionFlow(lambda x: x + 0.3 * torch.sin(x), dim=1)
    >>> found = find_bifurcation(flow, torch.tensor([1.0], dtype=torch.float64), steps=1, ascent_steps=200)
    >>> round(abs(found.points.item()), 3), round(found.exponents.exp().item(), 3)
    (0.0, 1.3)
    """
    starts = _rows(flow, start)
    if objective not in get_args(BifurcationObjective):
        raise InputError(f"objective must be one of {get_args(BifurcationObjective)}, got {objective!r}.")
    if not 1 <= count <= flow.dim or steps < 1 or ascent_steps < 0 or not epsilon > 0 or not learning_rate > 0:
        raise InputError(
            f"count must be from 1 to {flow.dim}, steps at least 1, ascent_steps at least 0, epsilon and learning_rate above "
            f"0; got count={count}, steps={steps}, ascent_steps={ascent_steps}, epsilon={epsilon} and learning_rate="
            f"{learning_rate}."
        )

    def value(points: Tensor) -> Tensor:
        if objective == "finite_size":
            return _finite_size(flow, points, steps, epsilon, step)
        return exponent_objective(differentiable_exponents(flow, points, steps, count, step), objective)

    points = starts.clone().requires_grad_()
    ascent = torch.optim.Adam([points], lr=learning_rate, maximize=True)
    path, before = [starts], None
    for _ in track(range(ascent_steps), "climbing to a bifurcation"):
        values = value(points)
        before = values.detach() if before is None else before
        # Of a linear map no exponent depends on the point.
        found = torch.autograd.grad(values.sum(), points)[0] if values.requires_grad else torch.zeros_like(points)
        points.grad = found
        if not found.isfinite().all():
            raise NonFinite("the objective's gradient is not finite. Start elsewhere, or take fewer steps.")
        ascent.step()
        path.append(points.detach().clone())
    found = points.detach()
    with torch.no_grad():
        values = value(found)
    exponents, directions = separating_directions(flow, found, steps, count, step)
    return Bifurcation(found, values, values if before is None else before, exponents, directions, torch.stack(path))


def branch(
    flow: Flow,
    points: Float[Tensor, "*start dim"],
    epsilon: float | Sequence[float],
    directions: Directions | Float[Tensor, "start count dim"] = "singular",
    count: int = 1,
    steps: int = 1000,
    *,
    horizon: int | None = None,
    places: int = 0,
    step: int = 0,
) -> Branches:
    """Leave points along ± directions, and train on.

    Args:
        flow: the maps.
        points: what to leave: one state, or many.
        epsilon: ε, how far; or several, to be tried side by side.
        directions: along what: ``"singular"``, ``"eigen"`` (of largest modulus first), or given ones.
        count: how many directions; for given ones their number counts.
        steps: T, for how long.
        horizon: k, for ``"singular"``.
        places: how many places of each path to keep, its ends included; 0: none.
        step: number of the flow's first step.

    Raises:
        InputError: a number is out of range, or a horizon is missing.
        NonFinite: a state is not finite.

    >>> flow = FunctionFlow(lambda x: x + 0.3 * torch.sin(x), dim=1)
    >>> branch(flow, torch.zeros(1, dtype=torch.float64), 0.1, steps=100, horizon=1).ends.flatten().round(decimals=3)
    tensor([ 3.1420, -3.1420], dtype=torch.float64)
    """
    points = _rows(flow, points)
    sizes = (float(epsilon),) if isinstance(epsilon, int | float) else tuple(float(size) for size in epsilon)
    if not sizes or not all(size > 0 for size in sizes) or steps < 1 or places == 1 or places < 0:
        raise InputError(
            f"epsilon must be above 0, steps at least 1 and places 0 or at least 2; got {epsilon}, {steps} and {places}."
        )
    if isinstance(directions, Tensor):
        units = directions / directions.norm(dim=-1, keepdim=True)
    elif directions == "singular":
        if horizon is None:
            raise InputError('directions="singular" are those of a number of steps: give horizon=k, or directions="eigen".')
        units = separating_directions(flow, points, horizon, count, step)[1]
    elif directions == "eigen":
        units = eigen_directions(flow, points, count, step)
    else:
        raise InputError(f'directions must be "singular", "eigen" or vectors, got {directions!r}.')
    moves = torch.tensor(sizes).to(units)[:, None] * torch.tensor([1.0, -1.0]).to(units)
    starts = points[:, None, None, None] + moves[..., None] * units[:, :, None, None]
    states, half = starts.flatten(0, -2), steps // 2
    kept = {round(place * steps / (places - 1)) for place in range(places)} if places else set()
    halfway, path = states, [states] if places else []
    forward = _many(flow)
    for done in track(range(1, steps + 1), "branches"):
        states = forward(step + done - 1, states)
        if done == half:
            halfway = states
        if done in kept:
            path.append(states)
    if not states.isfinite().all():
        raise NonFinite("a branch left the finite numbers. Take a smaller epsilon or learning rate.")
    paths = torch.stack(path).unflatten(1, starts.shape[:-1]) if places else None
    return Branches(points, units, sizes, states.view_as(starts), halfway.view_as(starts), paths)


def separating_directions(
    flow: Flow, points: Float[Tensor, "start dim"], steps: int, count: int = 1, step: int = 0
) -> tuple[Float[Tensor, "start count"], Float[Tensor, "start count dim"]]:
    """Return the exponents of k steps and the right singular vectors that they belong to, the largest first.

    Args:
        flow: the maps.
        points: states.
        steps: k.
        count: how many.
        step: number of the flow's first step.

    >>> shear = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    >>> _, rows = separating_directions(FunctionFlow(lambda w: shear @ w, 2), torch.zeros(1, 2, dtype=torch.float64), steps=1)
    >>> (rows[0, 0, 1] / rows[0, 0, 0]).item()                 # the golden ratio
    1.618...
    """
    if _in_one_call(flow):
        with torch.no_grad():
            product, scale = _product(flow, points, steps, step)
            _, values, rows = torch.linalg.svd(product)
            return ((values.log() + scale[:, None]) / steps)[:, :count], rows[:, :count]
    found = [finite_time_exponents(flow, point, steps, count, step=step) for point in points]
    return torch.stack([own.exponents for own in found]), torch.stack([own.right for own in found])


def eigen_directions(
    flow: Flow, points: Float[Tensor, "start dim"], count: int, step: int = 0
) -> Float[Tensor, "start count dim"]:
    """Return directions from the eigenvectors of J, by falling modulus: v of a real pair, Re v and then Im v of a complex one.

    The phase of a complex eigenvector is fixed so that Re v and Im v are orthogonal and Re v is the longer one.

    Args:
        flow: the maps.
        points: states.
        count: how many.
        step: number of the flow's step.

    Raises:
        InputError: there are not so many.

    >>> turn = torch.tensor([[0.0, -2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
    >>> eigen_directions(FunctionFlow(lambda w: turn @ w, 3), torch.zeros(1, 3, dtype=torch.float64), count=3).abs()[0, 2]
    tensor([0., 0., 1.], dtype=torch.float64)
    """
    found = []
    for point in points:
        own: list[Tensor] = []
        pairs = spectrum(flow, point, min(count + 1, flow.dim), step=step, vectors=True)
        assert pairs.vectors is not None
        for value, vector in zip(pairs.values, pairs.vectors, strict=True):
            if value.imag < 0:
                continue  # its partner has been there
            turned = vector * torch.exp(-0.5j * (vector * vector).sum().angle())
            parts = [turned.real, turned.imag] if value.imag > 0 else [turned.real]
            own += [part / part.norm() for part in parts if part.norm() > 1e-6]
        if len(own) < count:
            raise InputError(f"eigenvectors give {len(own)} directions here, asked for {count}.")
        found.append(torch.stack(own[:count]).to(point))
    return torch.stack(found)


def differentiable_exponents(
    flow: Flow, points: Float[Tensor, "start dim"], steps: int, count: int, step: int = 0
) -> Float[Tensor, "start count"]:
    """Return what `top_exponents` does, for a small `FunctionFlow` some times as fast: all Jacobians in one call."""
    if not _in_one_call(flow):
        if isinstance(flow, FunctionFlow):
            return top_exponents(flow, points, steps, count, step=step)
        return torch.stack([top_exponents(flow, point, steps, count, step=step) for point in points])
    product, scale = _product(flow, points, steps, step)
    rows = torch.linalg.svd(product.detach())[2][:, :count]
    lengths = torch.linalg.vector_norm(rows @ product.mT, dim=-1)  # of M v with v held fixed: its derivative is that of σ
    return (lengths.log() + scale[:, None]) / steps


# ---------------------------------------------------------------------------------------------------------------------


def _in_one_call(flow: Flow) -> bool:
    return isinstance(flow, FunctionFlow) and not flow.by_step and flow.dim <= _TOGETHER


def _product(flow: Flow, points: Tensor, steps: int, step: int) -> tuple[Tensor, Tensor]:
    """Return M_k of every point over its size e^scale, ``[start, dim, dim]``, and the scale; with graph where there is one."""
    check_step(flow, step + steps - 1)
    states, forward = [points], _many(flow)
    for current in range(steps - 1):
        states.append(forward(step + current, states[-1]))
    along = torch.stack(states)
    if not along.isfinite().all():
        raise NonFinite("a state is not finite within these steps. Start elsewhere, or take fewer steps.")
    derivative: Any = torch.func.jacfwd(lambda state: flow(step, state))
    jacobians = torch.func.vmap(derivative)(along.flatten(0, 1)).unflatten(0, along.shape[:2])
    product, scale = jacobians[0], points.new_zeros(len(points))
    for jacobian in jacobians[1:]:
        size = product.detach().abs().amax((1, 2)).clamp(min=torch.finfo(product.dtype).tiny)  # constants that cancel
        product, scale = jacobian @ (product / size[:, None, None]), scale + size.log()
    return product, scale


def _finite_size(flow: Flow, points: Tensor, steps: int, epsilon: float, step: int) -> Tensor:
    apart = epsilon * separating_directions(flow, points.detach(), steps, 1, step)[1][:, 0]
    states, forward = torch.cat([points + apart, points - apart]), _many(flow)
    for current in range(step, step + steps):
        states = forward(current, states)
    ahead, behind = states.chunk(2)
    return (torch.linalg.vector_norm(ahead - behind, dim=1) / (2 * epsilon)).log() / steps


def _many(flow: Flow) -> Callable[[int, Tensor], Tensor]:
    """Return the map of many states at once; those of a run one after the other."""
    if isinstance(flow, FunctionFlow):

        def forward(step: int, states: Tensor) -> Tensor:
            check_step(flow, step)
            return torch.func.vmap(lambda state: flow(step, state))(states)

        return forward

    def one_by_one(step: int, states: Tensor) -> Tensor:
        plain = isinstance(flow, StepFlow) and not states.requires_grad
        one: Callable[[int, Tensor], Tensor] = flow.advance if plain else flow  # pyright: ignore[reportAttributeAccessIssue]
        return torch.stack([one(step, state) for state in states])

    return one_by_one


def _rows(flow: Flow, start: Tensor) -> Tensor:
    if start.dim() not in (1, 2) or start.shape[-1] != flow.dim or not start.numel():
        raise InputError(f"states are vectors of {flow.dim} numbers, one or rows of them; got shape {tuple(start.shape)}.")
    return start.detach().reshape(-1, flow.dim).clone()
