"""Generalised Ridge Rider: find several solutions from one start, by climbing to a bifurcation and leaving it both ways.

    repeat from every new solution, to a given depth:
        climb the k-step exponent to w*            (`find_bifurcation`)
        leave w* along ± its directions            (`branch`)
        add the ends to the archive                (`BranchTree`)

In a game the Jacobian of a step is not symmetric, and a complex pair of its eigenvalues turns instead of parting: then no
eigenvector of a stationary point leads to another solution, but between two basins there are still large exponents.

**Remedies.** The method fails in known ways (see ``bifurcation.py``): a horizon k that is too short for the dynamics, a step ε
that does not reach across, an exponent that is large for the wrong reason. By default it therefore climbs for k, 2k and 4k
steps, both the objective that was asked for and the finite-size one, tries ε/8, ε/4, ε/2 and ε, and keeps, for each start, the
smallest ε at which branches end in different solutions. ``remedies=False`` is the method as published.

**Comparison.** Branching without climbing, from the same start along its own top direction (``"own"``) and along a random one
(``"random"``), is always done as well, with the same steps ε (and the same k; as many random directions as points were climbed
to), and stands in the same tree. If climbing does not find more than this, it was not needed; it may find less, even with
remedies, where solutions attract weakly (``docs/ridge_rider.md``). The tree as a whole never finds less than its comparisons.

Cost: see ``bifurcation.py``; with remedies fourteen times the ascent, as the sum of all k, and four times the branches.

Reference: Lorraine et al. (2022), "Lyapunov exponents for diversity in differentiable games", arXiv 2112.14570.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.dynamics.bifurcation import (
    BifurcationObjective,
    Branches,
    Directions,
    branch,
    eigen_directions,
    find_bifurcation,
    separating_directions,
)
from retrograd.dynamics.branching import Archive, BranchTree, Kind, Same, within
from retrograd.dynamics.flow import Flow
from retrograd.errors import InputError

HORIZONS = (1, 2, 4)
"""What k is multiplied by, one after the other."""
SIZES = (0.125, 0.25, 0.5, 1.0)
"""What ε is multiplied by, one after the other."""


@dataclass(frozen=True)
class _Candidate:
    """One way to choose points and directions for all parents."""

    points: Float[Tensor, "parent dim"]
    directions: Float[Tensor, "parent count dim"]
    exponents: Float[Tensor, "parent rank"]
    horizon: int | None
    objective: str | None


def generalised_ridge_rider(
    flow: Flow,
    start: Float[Tensor, "*start dim"],
    steps: int,
    *,
    objective: BifurcationObjective = "max",
    count: int = 1,
    epsilon: float = 0.5,
    directions: Directions = "singular",
    branch_steps: int = 1000,
    depth: int = 1,
    ascent_steps: int = 40,
    learning_rate: float = 0.1,
    remedies: bool = True,
    same: Same | None = None,
    tolerance: float = 0.01,
    places: int = 0,
    seed: int = 0,
    step: int = 0,
) -> BranchTree:
    """Return the tree of branches from one start or many, and the solutions they found.

    Args:
        flow: the maps; for a game best a `FunctionFlow` of its operator.
        start: one state, or many; for logits of a game, normal numbers of variance 1 are a usual choice.
        steps: k, over which neighbours are to part.
        objective: what to climb; see `find_bifurcation`.
        count: how many directions to branch in, and exponents to climb.
        epsilon: ε, how far to step off a point (with remedies, at most).
        directions: ``"singular"`` or ``"eigen"``; see `branch`.
        branch_steps: T, for how long to train each branch.
        depth: how often to go on from solutions that are new; 1: not at all.
        ascent_steps: of Adam.
        learning_rate: of Adam, in units of the state.
        remedies: try several k and ε, and the finite-size objective, as described above.
        same: whether two points are the same solution; None: if within ``tolerance``.
        tolerance: distance of points that are the same solution.
        places: how many places of each path to keep; 0: none.
        seed: of the random directions.
        step: number of the flow's first step.

    Returns:
        A tree with branches of the kinds ``"climbed"``, ``"own"`` and ``"random"``; ``tree.shares(kind)`` is the share of
        starts from which two solutions or more were found.

    Raises:
        InputError: a number is out of range.
        NonFinite: a state, a product or a gradient is not finite.

    From a start far from 0, which parts −π from π for x + .3 sin x:

    >>> from retrograd.dynamics import FunctionFlow
    >>> flow = FunctionFlow(lambda x: x + 0.3 * torch.sin(x), dim=1)
    >>> start = torch.tensor([1.0], dtype=torch.float64)
    >>> tree = generalised_ridge_rider(flow, start, steps=2, ascent_steps=15, branch_steps=100)
    >>> sorted(round(solution.item(), 3) for solution in tree.solutions)
    [-3.142, 3.142]
    >>> tree.shares("climbed"), tree.shares("own")
    (1.0, 0.0)
    """
    if depth < 1:
        raise InputError(f"depth must be at least 1, got {depth}.")
    starts = start.detach().reshape(-1, start.shape[-1])
    tree = BranchTree(starts, Archive(within(tolerance) if same is None else same))
    horizons = [factor * steps for factor in HORIZONS] if remedies else [steps]
    if flow.steps is not None:
        horizons = [horizon for horizon in horizons if step + horizon <= flow.steps] or [steps]
    sizes = [factor * epsilon for factor in SIZES] if remedies else [epsilon]
    objectives: list[BifurcationObjective] = list(dict.fromkeys([objective, "finite_size"])) if remedies else [objective]

    def candidate(points: Tensor, horizon: int, climbed: BifurcationObjective | None) -> _Candidate:
        if climbed is not None:
            points = find_bifurcation(
                flow,
                points,
                horizon,
                objective=climbed,
                count=count,
                epsilon=epsilon,
                ascent_steps=ascent_steps,
                learning_rate=learning_rate,
                step=step,
            ).points
        exponents, rows = separating_directions(flow, points, horizon, count, step)
        if directions == "eigen":
            rows = eigen_directions(flow, points, count, step)
        return _Candidate(points, rows, exponents, horizon, climbed)

    def grow(parents: list[int], kinds: dict[Kind, list[_Candidate]]) -> None:
        candidates = [own for every in kinds.values() for own in every]
        points = torch.cat([own.points for own in candidates])
        rows = torch.cat([own.directions for own in candidates])
        found = branch(flow, points, sizes, rows, steps=branch_steps, places=places, step=step)  # all at once: that is fast
        first = 0
        for kind, every in kinds.items():
            numbers = range(first, first + len(every))
            for place, parent in enumerate(parents):
                chosen, size = _first_apart(tree.archive.same, found, [number * len(parents) + place for number in numbers])
                _add(tree, kind, parent, every[chosen], place, found, (first + chosen) * len(parents) + place, size)
            first += len(every)

    generator = torch.Generator().manual_seed(seed)
    parents, expanded = list(range(len(starts))), set()
    for level in range(depth):
        points = torch.stack([tree.nodes[parent].end for parent in parents])
        kinds: dict[Kind, list[_Candidate]] = {
            "climbed": [candidate(points, horizon, own) for own in objectives for horizon in horizons]
        }
        if level == 0:
            none, shape = starts.new_zeros(len(starts), 0), (len(starts), count, flow.dim)
            draws = [torch.randn(shape, generator=generator).to(starts) for _ in kinds["climbed"]]
            kinds["own"] = [candidate(starts, horizon, None) for horizon in horizons]
            kinds["random"] = [_Candidate(starts, draw, none, None, None) for draw in draws]
        grow(parents, kinds)
        firsts = {node.solution: node.number for node in reversed(tree.branches("climbed")) if node.solution is not None}
        parents = [number for solution, number in sorted(firsts.items()) if solution not in expanded]
        expanded |= firsts.keys()
        if not parents:
            break
    return tree


def _first_apart(same: Same, found: Branches, rows: list[int]) -> tuple[int, int]:
    """Return the first candidate, and the smallest ε, whose branches end in different solutions; else the first and largest."""
    sizes = len(found.epsilons)
    for size in range(sizes):
        for own, row in enumerate(rows):
            ends, halfway = (part[row, :, size].flatten(0, 1) for part in (found.ends, found.halfway))
            arrived = [end for end, half in zip(ends, halfway, strict=True) if same(end, half)]
            if any(not same(arrived[0], other) for other in arrived[1:]):
                return own, size
    return 0, sizes - 1


def _add(tree: BranchTree, kind: Kind, parent: int, own: _Candidate, place: int, found: Branches, row: int, size: int) -> None:
    for number, direction in enumerate(found.directions[row]):
        for side, sign in enumerate((1, -1)):
            at = (row, number, size, side)
            tree.add(
                parent,
                kind,
                found.points[row],
                direction,
                sign,
                found.epsilons[size],
                end=found.ends[at],
                halfway=found.halfway[at],
                horizon=own.horizon,
                objective=own.objective,
                exponents=own.exponents[place].tolist(),
                path=None if found.paths is None else found.paths[(slice(None), *at)],
            )
