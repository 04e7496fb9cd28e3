"""The explorer page: what a model gets wrong, which training images made it so, and whether that was predicted right.

``FOLDER/index.html`` carries its texts, numbers and thumbnails inside; ``FOLDER/plotly.min.js`` lies beside it. Nothing is
fetched from anywhere, so the folder can be opened from disk, zipped, and sent.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from retrograd.attribution import Check
from retrograd.errors import InputError
from retrograd.files import replace_file
from retrograd.optional import optional
from retrograd.report.png import data_uri
from retrograd.report.sentences import ceilings, size_of_changes

_MARK = '<meta name="generator" content="retrograd">'  # in the head of every page, so that we overwrite only our own


@dataclass(frozen=True)
class RankedImage:
    """A training image and its score for a query.

    Attributes:
        example_id: its id.
        image: grey ``[height, width]`` or RGB ``[height, width, 3]``, bytes or floats from 0 to 1.
        label: the label it was trained with.
        score: by how much one unit of its weight raises the query's measurement.
    """

    example_id: int
    image: Tensor
    label: str
    score: float


@dataclass(frozen=True)
class QueryView:
    """What the page shows of one query.

    Attributes:
        query_id: its id.
        image: as in `RankedImage`.
        label: the true label.
        predicted_label: what the model says.
        measurement: what was asked of the model for this query.
        helpful: training images that raise the measurement most, strongest first.
        harmful: those that lower it most, strongest first.
        note: a sentence about this query.
    """

    query_id: int
    image: Tensor
    label: str
    predicted_label: str
    measurement: float
    helpful: Sequence[RankedImage]
    harmful: Sequence[RankedImage]
    note: str = ""

    @property
    def wrong(self) -> bool:
        """Whether the model says something else than the true label."""
        return self.label != self.predicted_label

    @property
    def strongest(self) -> float:
        """The largest score by size; bars are drawn in proportion to it."""
        return max((abs(ranked.score) for ranked in (*self.helpful, *self.harmful)), default=0.0) or 1.0


@dataclass(frozen=True)
class MethodView:
    """How well one method predicted the retrained models.

    Attributes:
        name: the method.
        description: what it does, in half a sentence.
        predicted: measurements that it predicts for each retraining.
        check: these predictions beside what came out.
    """

    name: str
    description: str
    predicted: Float[Tensor, "subset query"]
    check: Check


def write_report(
    folder: str | os.PathLike[str],
    *,
    title: str,
    lede: str,
    facts: Mapping[str, str],
    queries: Sequence[QueryView],
    methods: Sequence[MethodView],
    actual: Float[Tensor, "subset query"],
    measurement: str = "margin",
    unit: str = "nats",
) -> Path:
    """Write the page.

    Args:
        folder: where to; made if it does not exist, and an earlier page in it is replaced.
        title: the headline.
        lede: what was trained and what is shown, in a sentence or two.
        facts: what a reader must know to judge the numbers: heading and text.
        queries: what is shown, in this order.
        methods: how well methods predicted, the one that ranked the training images first.
        actual: measurement of each query after each retraining, columns in the order of ``queries``.
        measurement: what is measured, in a word.
        unit: its unit.

    Returns:
        The path of ``index.html``.

    Raises:
        InputError: there is nothing to show, arrays do not fit together, or ``folder`` holds somebody else's files.
        MissingDependency: Jinja2 or plotly is not installed.
    """
    jinja2, plotly = optional("jinja2", "report"), optional("plotly.offline", "report")
    if not queries or not methods:
        raise InputError("a page needs at least one query and one method.")
    for method in methods:
        shapes = {tuple(values.shape) for values in (method.predicted, method.check.predicted, actual)}
        if len(shapes) > 1 or actual.shape[1] != len(queries):
            raise InputError(
                f"predictions of {method.name} have shape {tuple(method.predicted.shape)}, those of its check "
                f"{tuple(method.check.predicted.shape)}, the outcomes {tuple(actual.shape)}; all must be [subset, query] with "
                f"{len(queries)} queries."
            )
    target = Path(folder)
    _refuse_foreign(target)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "signed": _signed, "size_of_changes": size_of_changes}
    page = environment.get_template("page.html.j2").render(
        mark=_MARK,
        title=title,
        lede=lede,
        facts=facts,
        queries=queries,
        methods=methods,
        ceilings=list(dict.fromkeys(says for method in methods for says in ceilings(method.check))),  # usually of all methods
        subsets=len(actual),
        measurement=measurement,
        unit=unit,
        data={
            "measurement": measurement,
            "unit": unit,
            "queries": [{"id": query.query_id, "label": query.label, "says": query.predicted_label} for query in queries],
            "methods": [{"name": method.name, "predicted": _columns(method.predicted)} for method in methods],
            "actual": _columns(actual),
        },
    )
    target.mkdir(parents=True, exist_ok=True)
    _write(target / "plotly.min.js", plotly.get_plotlyjs())
    _write(target / "index.html", page)  # last: a page that is there can be opened
    return target / "index.html"


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; the page needs a folder of its own.")
    for name, mark in (("index.html", _MARK), ("plotly.min.js", "plotly.js")):
        file = folder / name
        if file.exists() and mark not in file.read_bytes()[:4096].decode("utf-8", errors="replace"):
            raise InputError(f"{file} was not written by retrograd and would be lost. Give another folder.")


def _columns(values: Tensor) -> list[list[float | None]]:
    """One list a query, in five digits: what can be seen; JSON has no word for NaN or infinity."""
    return [[float(f"{value:.5g}") if abs(value) < float("inf") else None for value in column] for column in values.T.tolist()]


def _signed(value: float, digits: int = 3) -> str:
    """Write a number with its sign; a true minus is as wide as a plus.

    >>> _signed(-0.5, 2)
    '−0.50'
    """
    return f"{value:+.{digits}f}".replace("-", "−")


def _write(file: Path, text: str) -> None:
    replace_file(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
