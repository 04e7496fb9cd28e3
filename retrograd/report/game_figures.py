"""Pictures of games and of training as a dynamical system: phase portraits, spectra, trees of branches.

Every function returns a plotly figure: ``figure.show()``, or ``figure.write_html("portrait.html")`` for a page to open.

A portrait shows two coordinates of a point: of a game with two parameters these are all there are. In a larger one they span
the plane ``centre + a · across + b · up``, and arrows show what of −g lies in that plane.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.cases import GameCase
from retrograd.dynamics import BranchTree
from retrograd.errors import InputError
from retrograd.optional import optional

_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
_GREY = "#9498a0"


def phase_portrait(
    case: GameCase,
    paths: Sequence[Float[Tensor, "place dim"]] = (),
    *,
    centre: Float[Tensor, " dim"] | None = None,
    across: Float[Tensor, " dim"] | None = None,
    up: Float[Tensor, " dim"] | None = None,
    extent: float = 3.0,
    arrows: int = 17,
    shown: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Draw where simultaneous gradient descent goes from each point of a plane, and paths of training in it.

    Args:
        case: the game.
        paths: points that training went through.
        centre: the middle of the plane; 0 if not given.
        across: the direction of the first axis; that of the first parameter if not given. Made a unit vector.
        up: that of the second axis, likewise; what of it lies along ``across`` is taken off.
        extent: how far the plane reaches to either side, in units of the parameters.
        arrows: arrows in a row, all of one length: the direction counts.
        shown: maps coordinates ``[point, 2]`` to what the axes show, such as ``torch.sigmoid`` for logits.

    Returns:
        A plotly figure.

    Raises:
        MissingDependency: plotly is not installed.
        InputError: the two directions are the same line, or a number is out of range.
    """
    plotly = optional("plotly.graph_objects", "report")
    if arrows < 2 or not extent > 0:
        raise InputError(f"arrows must be at least 2 and extent positive, got {arrows} and {extent}.")
    unit = torch.eye(case.dim, dtype=torch.float64)
    if case.dim < 2:
        raise InputError(f"{case.name} has one parameter; a portrait needs two.")
    middle = torch.zeros(case.dim, dtype=torch.float64) if centre is None else centre.double()
    first, second = (unit[0] if across is None else across.double()), (unit[1] if up is None else up.double())
    first = first / first.norm()
    second = second - (second @ first) * first
    if not second.norm() > 1e-9:
        raise InputError("across and up point along the same line; a plane needs two directions.")
    plane = torch.stack([first, second / second.norm()])
    shown = shown or (lambda coordinates: coordinates)

    ticks = torch.linspace(-extent, extent, arrows, dtype=torch.float64)
    grid = torch.cartesian_prod(ticks, ticks)
    flow = -torch.func.vmap(case.gradient)(middle + grid @ plane) @ plane.T
    step = 0.7 * 2 * extent / (arrows - 1) * flow / flow.norm(dim=1, keepdim=True).clamp(min=1e-12)
    tails, heads = shown(grid), shown(grid + step)
    lines = torch.stack([tails, heads, torch.full_like(tails, torch.nan)], 1).reshape(-1, 2)
    figure = plotly.Figure()
    _scatter(figure, lines, mode="lines", line={"color": _GREY, "width": 1}, hoverinfo="skip", name="−g")
    _scatter(figure, tails, mode="markers", marker={"color": _GREY, "size": 3}, showlegend=False)
    for number, path in enumerate(paths):
        colour, places = _COLOURS[number % len(_COLOURS)], shown((path.double() - middle) @ plane.T)
        _scatter(figure, places, mode="lines", line={"color": colour}, name=f"path {number}")
        _scatter(figure, places[-1:], mode="markers", marker={"color": colour}, showlegend=False)
    return _titled(figure, case.name, "first player" if across is None else "across", "second player" if up is None else "up")


def spectrum_figure(values: Tensor, title: str = "eigenvalues of one step") -> Any:
    """Draw eigenvalues of a step in the complex plane, with the unit circle that decides on convergence.

    Args:
        values: λ, complex ``[count]``, as `retrograd.dynamics.spectrum` gives them.
        title: of the figure.

    Returns:
        A plotly figure.

    Raises:
        MissingDependency: plotly is not installed.
    """
    plotly = optional("plotly.graph_objects", "report")
    angle = torch.linspace(0, 2 * torch.pi, 181)
    figure = plotly.Figure()
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    _scatter(figure, circle, mode="lines", line={"color": _GREY}, name="|λ| = 1", hoverinfo="skip")
    inside = values.abs() < 1
    for chosen, name, colour in ((inside, "shrinks", _COLOURS[0]), (~inside, "grows or stays", _COLOURS[2])):
        own = torch.view_as_real(values[chosen].to(torch.complex128))
        _scatter(figure, own, mode="markers", marker={"color": colour, "size": 8}, name=name)
    figure.update_yaxes(scaleanchor="x")
    return _titled(figure, title, "Re λ", "Im λ")


def branch_tree_figure(tree: BranchTree, shown: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Draw a tree of branches: every branch from the point that it left to its end, in the colour of its solution.

    Args:
        tree: what `generalised_ridge_rider` or `ridge_rider` found; with ``keep_paths`` the ways are drawn, else lines.
        shown: maps points ``[point, dim]`` to the two coordinates drawn, ``[point, 2]``; the first two if not given.

    Returns:
        A plotly figure. Branches that had not arrived are grey; those that did not climb before are dotted.

    Raises:
        MissingDependency: plotly is not installed.
        InputError: points have one coordinate, and ``shown`` was not given.
    """
    plotly = optional("plotly.graph_objects", "report")
    if shown is None and len(tree.nodes[0].point) < 2:
        raise InputError("points have a single coordinate: give shown=, which makes two of it.")
    shown = shown or (lambda points: points[:, :2])
    figure, named = plotly.Figure(), set[str]()
    for node in tree.branches():
        parent = tree.nodes[node.parent if node.parent is not None else 0]
        ways = [parent.end if parent.kind != "start" else parent.point, node.point]
        way = torch.cat([torch.stack(ways), node.end[None] if node.path is None else node.path]).double()
        places = shown(way)
        name = "not arrived" if node.solution is None else f"solution {node.solution}"
        colour = _GREY if node.solution is None else _COLOURS[node.solution % len(_COLOURS)]
        dash = "solid" if node.kind in ("climbed", "ridge") else "dot"
        _scatter(
            figure,
            places,
            mode="lines+markers",
            line={"color": colour, "dash": dash},
            marker={"size": [0] * (len(places) - 1) + [8]},
            name=name,
            legendgroup=name,
            showlegend=name not in named,
            hovertext=f"{node.kind}, depth {node.depth}, sign {node.sign:+d}, ε {node.epsilon:g}",
        )
        named.add(name)
    starts = shown(torch.stack([node.point for node in tree.nodes[: tree.starts]]).double())
    _scatter(figure, starts, mode="markers", marker={"color": "black", "symbol": "x"}, name="start")
    return _titled(figure, f"{len(tree.solutions)} solutions", "first coordinate", "second coordinate")


def _scatter(figure: Any, places: Float[Tensor, "place 2"], **options: Any) -> None:
    x, y = places.detach().T.tolist()
    figure.add_scatter(x=x, y=y, **options)


def _titled(figure: Any, title: str, across: str, up: str) -> Any:
    figure.update_layout(title=title, xaxis_title=across, yaxis_title=up, template="plotly_white", width=640, height=560)
    return figure
