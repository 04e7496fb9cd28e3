"""What branching from points of training finds: a tree of branches, and an archive of distinct solutions.

Every start is a root. A branch leaves the point that the ascent from its parent led to (or the parent's own point, where
nothing was climbed), in a direction and with a sign, and ends in a solution, or in none if it still moves. A branch whose
solution is new can be a parent again. Branches of the comparisons that did not climb are in the same tree, of another kind.

Two ends are the same solution if ``same`` says so; by default, if they lie within ``tolerance`` of each other. An end is a
solution only if it is the same as where its branch was after half of its steps. Where solutions lie at infinity (probabilities
0 and 1 as logits) distances never settle: compare losses or probabilities instead, as `retrograd.cases.GameCase.same` does.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Same = Callable[[Tensor, Tensor], bool]
Kind = Literal["start", "climbed", "own", "random", "ridge"]


def within(tolerance: float) -> Same:
    """Return the comparison of two points by their distance.

    >>> within(0.1)(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.05]))
    True
    """
    return lambda first, second: bool(torch.linalg.vector_norm(first - second) <= tolerance)


@dataclass
class Archive:
    """Distinct solutions, numbered in the order of their discovery.

    >>> archive = Archive(within(0.1))
    >>> [archive.add(torch.tensor([value]), torch.tensor([value])) for value in (1.0, 2.0, 1.05)]
    [0, 1, 0]
    >>> archive.add(torch.tensor([9.0]), halfway=torch.tensor([7.0])) is None
    True
    """

    same: Same
    solutions: list[Tensor] = field(default_factory=list)

    def add(self, end: Float[Tensor, " dim"], halfway: Float[Tensor, " dim"]) -> int | None:
        """Return the number of a solution, a new one if it is; None if ``halfway`` was elsewhere."""
        if not self.same(end, halfway):
            return None
        for number, known in enumerate(self.solutions):
            if self.same(end, known):
                return number
        self.solutions.append(end.detach().clone())
        return len(self.solutions) - 1


@dataclass(frozen=True)
class BranchNode:
    """A start, or one branch.

    Attributes:
        number: of the node, its place in the tree's list.
        parent: the node it came from; None for a start.
        start: number of the start that it goes back to.
        depth: 0 for starts.
        kind: ``"start"``; ``"climbed"``: from a point with a large exponent; ``"own"``: from the parent's own point along its
            own top direction; ``"random"``: from there along a random one; ``"ridge"``: down a direction of negative curvature.
        point: what it left.
        direction: unit vector along which it left; None for a start.
        sign: +1 or −1; 0 for a start.
        epsilon: how far at first.
        horizon: k of the exponents, where there were any.
        objective: what was climbed, if anything was.
        exponents: at the point, the largest first; for a ridge the curvature.
        end: where it ended; the point itself for a start.
        solution: number of the solution; None if it had not arrived.
        path: states on the way, if they were kept.
    """

    number: int
    parent: int | None
    start: int
    depth: int
    kind: Kind
    point: Float[Tensor, " dim"]
    direction: Float[Tensor, " dim"] | None
    sign: int
    epsilon: float
    horizon: int | None
    objective: str | None
    exponents: tuple[float, ...]
    end: Float[Tensor, " dim"]
    solution: int | None
    path: Float[Tensor, "place dim"] | None = None


class BranchTree:
    """All branches from some starts, with the solutions that they found.

    Args:
        starts: one root each.
        archive: of the solutions.

    Attributes:
        nodes: the starts first, then branches in the order of their making.

    >>> tree = BranchTree(torch.zeros(1, 2), Archive(within(0.1)))
    >>> ahead, behind = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])
    >>> for sign, end in ((1, ahead), (-1, behind)):
    ...     node = tree.add(0, "own", torch.zeros(2), ahead, sign, 0.5, end=end, halfway=end)
    >>> tree.solutions_of(start=0, kind="own"), tree.shares("own")
    ({0, 1}, 1.0)
    """

    def __init__(self, starts: Float[Tensor, "start dim"], archive: Archive):
        self.archive = archive
        self.nodes = [
            BranchNode(number, None, number, 0, "start", point, None, 0, 0.0, None, None, (), point, None)
            for number, point in enumerate(starts.detach())
        ]
        self.starts = len(self.nodes)

    @property
    def solutions(self) -> list[Tensor]:
        """One end for each distinct solution, by number."""
        return self.archive.solutions

    def add(
        self,
        parent: int,
        kind: Kind,
        point: Float[Tensor, " dim"],
        direction: Float[Tensor, " dim"],
        sign: int,
        epsilon: float,
        *,
        end: Float[Tensor, " dim"],
        halfway: Float[Tensor, " dim"],
        horizon: int | None = None,
        objective: str | None = None,
        exponents: Sequence[float] = (),
        path: Float[Tensor, "place dim"] | None = None,
    ) -> BranchNode:
        """Add a branch of a node; the archive says which solution it found."""
        above = self.nodes[parent]
        node = BranchNode(
            number=len(self.nodes),
            parent=parent,
            start=above.start,
            depth=above.depth + 1,
            kind=kind,
            point=point,
            direction=direction,
            sign=sign,
            epsilon=epsilon,
            horizon=horizon,
            objective=objective,
            exponents=tuple(exponents),
            end=end,
            solution=self.archive.add(end, halfway),
            path=path,
        )
        self.nodes.append(node)
        return node

    def branches(self, kind: Kind | None = None, start: int | None = None) -> list[BranchNode]:
        """Return the branches, of one kind or one start if asked for."""
        return [
            node
            for node in self.nodes[self.starts :]
            if (kind is None or node.kind == kind) and (start is None or node.start == start)
        ]

    def solutions_of(self, start: int, kind: Kind | None = None) -> set[int]:
        """Return the numbers of the solutions found from one start, by the branches of one kind or by all."""
        return {node.solution for node in self.branches(kind, start) if node.solution is not None}

    def shares(self, kind: Kind | None = None, solutions: int = 2) -> float:
        """Return the share of starts from which at least so many solutions were found, by one kind of branches or by all."""
        return sum(len(self.solutions_of(start, kind)) >= solutions for start in range(self.starts)) / self.starts

    def kinds(self) -> list[Kind]:
        """Return the kinds of branches that there are, in the order of their making."""
        return list(dict.fromkeys(node.kind for node in self.branches()))

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one dict of plain numbers and lists a node, for a table, a plot or a file."""

        def plain(value: Any) -> Any:
            return value.tolist() if isinstance(value, Tensor) else list(value) if isinstance(value, tuple) else value

        return [{name: plain(value) for name, value in vars(node).items()} for node in self.nodes]

    def save(self, path: str | Path) -> None:
        """Write ``{"solutions": …, "nodes": …}`` as JSON."""
        content = {"solutions": [solution.tolist() for solution in self.solutions], "nodes": self.to_rows()}
        Path(path).write_text(json.dumps(content), encoding="utf-8")

    def __str__(self) -> str:
        """Say how many solutions each kind of branch found."""
        lines = [f"{len(self.solutions)} solutions, {len(self.branches())} branches from {self.starts} starts"]
        for kind in self.kinds():
            found = [len(self.solutions_of(start, kind)) for start in range(self.starts)]
            several = sum(number >= 2 for number in found)
            lost = sum(node.solution is None for node in self.branches(kind))
            lines.append(f"  {kind:8} two or more from {several} of {self.starts} starts; {lost} branches had not arrived")
        return "\n".join(lines)
