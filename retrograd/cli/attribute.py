"""``retrograd attribute``."""

import json
import math
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from retrograd.cli.console import errors_as_messages, print_ceilings, print_check, progress_bars, warnings_as_messages
from retrograd.cli.source import Source as Place
from retrograd.errors import CorruptRecord, InputError

if TYPE_CHECKING:
    from retrograd import Scores

QUERIES_SHOWN = 5


def attribute(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="path/to/script.py:function or package.module:function. It is called without arguments and returns "
            "(run, queries): a recorded run, for example from open_run(...), and what is asked about.",
        ),
    ],
    method: Annotated[
        Literal["unrolled", "source", "influence", "tracin", "blend", "auto"],
        typer.Option(
            help="Exact, back through every step; SOURCE; influence functions with EK-FAC; gradients at some checkpoints; "
            "exact and SOURCE blended; or what promises most for --budget."
        ),
    ] = "unrolled",
    budget: Annotated[
        float | None, typer.Option(min=0.0, help="auto: processor time, in epochs of the run's own training.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Answer all queries by so many directions.")] = None,
    checkpoints: Annotated[int | None, typer.Option(min=1, help="tracin: number of checkpoints (default 6).")] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Share of the examples that stays in the change that is asked about; 1 for small removals."),
    ] = None,
    removal: Annotated[Literal["zero_weight", "deletion"] | None, typer.Option(help="How examples are removed.")] = None,
    check: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Retrain on so many random subsets and compare; 0 for as many as cost no more than the scores themselves.",
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Keep finished parts here; the same command goes on after the last one.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Parquet file for the scores.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many examples to print for a query, in each direction.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score the training examples of a run: which of them raise and lower what is measured, and check it by retraining."""
    with errors_as_messages():
        how = _options(method, budget, rank, checkpoints) | {"folder": folder}
        _refuse_options(keep, removal, check, output)
        place = Place.of(source)
    # Standard output is for the one object: what the user's code prints must not get into it.
    aside = redirect_stdout(sys.stderr) if as_json else nullcontext()
    with aside, warnings_as_messages(), progress_bars(), place.importable():
        module = place.imported()  # not in errors_as_messages: what goes wrong in the user's code is shown where it does
        with errors_as_messages():
            function = place.named(module)
        given = function()
        with errors_as_messages():
            scores = _scores(source, given, how, keep, removal, check, output)
    if as_json:
        typer.echo(json.dumps(_plain(scores, top, output), indent=1))
    else:
        _print_scores(Console(), scores, top, output)


def _options(name: str, budget: float | None, rank: int | None, checkpoints: int | None) -> dict[str, Any]:
    """What `retrograd.attribute` is to be given for a method."""
    from retrograd import Blend, Implicit, Source, TracIn, Unrolled

    if checkpoints is not None and name != "tracin":
        raise InputError(f"--checkpoints is for --method tracin, not for {name}.")
    if (budget is not None) != (name == "auto"):
        raise InputError("--budget and --method auto belong together: how much may it cost, in epochs of the run's training?")
    if name == "auto":
        return {"method": "auto", "budget": budget, "rank": rank}
    if name == "unrolled":
        return {"method": Unrolled(rank=rank)}
    if name == "tracin":
        return {"method": TracIn() if checkpoints is None else TracIn(checkpoints), "rank": rank}
    return {"method": {"source": Source, "influence": Implicit, "blend": Blend}[name](), "rank": rank}


def _refuse_options(keep: float | None, removal: Any, check: int | None, output: Path | None) -> None:
    """Refuse before the work what would fail after it."""
    from retrograd import Counterfactual, Scores
    from retrograd.optional import optional

    if keep is not None:
        Counterfactual(keep, removal or "zero_weight")
    if check is not None:
        optional("scipy.stats", "report")
        if 0 < check < 3:
            raise InputError(
                f"a correlation needs at least 3 subsets, got --check {check}; 0 chooses a number that fits the cost."
            )
    if output is None:
        return
    if output.exists():
        try:
            Scores.from_parquet(output)
        except (CorruptRecord, OSError):
            raise InputError(
                f"{output} is there and is no whole table of scores; it would be lost. Give another file with --output."
            ) from None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"there can be no folder {output.parent}: {error.strerror}. Give another file with --output."
        ) from error


def _scores(
    source: str, given: Any, how: dict[str, Any], keep: float | None, removal: Any, check: int | None, output: Path | None
) -> "Scores":
    import retrograd

    kinds = (retrograd.Trajectory,) if check is not None else (retrograd.Trajectory, retrograd.CheckpointSeries)
    if not isinstance(given, tuple | list) or len(given) != 2 or not isinstance(given[0], kinds):
        allowed = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{source} must return (run, queries), the run a {allowed}; it returned {_type(given)}.")
    run, queries = given
    if check is not None and run.counterfactual.keep != 1.0:
        raise InputError("--check needs a run that was recorded with keep=1; a matched run cannot be retrained in its place.")
    scores = retrograd.attribute(run, queries, **how, keep=keep, removal=removal or "zero_weight")
    if output is not None:
        scores.to_parquet(output)  # before the check, so that the scores survive whatever happens in it
    if check is not None:
        scores = retrograd.check(scores, run, subsets=check or None)
        if output is not None:
            scores.to_parquet(output)
    return scores


def _type(given: Any) -> str:
    if isinstance(given, tuple | list):
        return f"({', '.join(type(one).__name__ for one in given)})"
    return type(given).__name__


def _tops(scores: "Scores", query: int, count: int) -> dict[str, list[Any]]:
    """The strongest examples in each direction; the least raising ones are not lowering ones."""
    return {
        name: [one for one in scores.top(query, count, lowering=lowering) if (one.score < 0 if lowering else one.score > 0)]
        for name, lowering in (("raising", False), ("lowering", True))
    }


def _plain(scores: "Scores", top: int, output: Path | None) -> dict[str, Any]:
    """Everything that is said about scores, ready for JSON."""
    ids, change, found = scores.query_ids.tolist(), scores.counterfactual, scores.check
    checked = None
    if found is not None:
        checked = {"says": str(found), "subsets": len(found.actual), "seeds": found.seeds}
        for name in ("pearson", "spearman", "slope"):
            one = getattr(found, name)
            checked[name] = {"value": one.value, "low": one.low, "high": one.high, "confidence": one.confidence}
        checked |= {"ceilings": dict(found.ceilings), "advice": list(found.advice)}
    plain = {
        "method": scores.method,
        "unit": scores.unit,
        "counterfactual": {"keep": change.keep, "removal": change.removal, "seeds": change.seeds},
        "examples": len(scores.example_ids),
        "queries": ids,
        "top": [
            {"query": query} | {way: [vars(one) for one in ranked] for way, ranked in _tops(scores, query, top).items()}
            for query in ids
        ],
        "check": checked,
        "notes": dict(scores.notes),
        "output": None if output is None else str(output),
    }
    return _without_nan(plain)


def _without_nan(value: Any) -> Any:
    """Replace what JSON has no word for."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_scores(console: Console, scores: "Scores", top: int, output: Path | None) -> None:
    ids = scores.query_ids.tolist()
    console.print(
        f"{scores.method}: {len(ids):,} queries, {len(scores.example_ids):,} training examples; {scores.counterfactual}.",
        highlight=False,
        markup=False,
    )
    for key in ("why", "more"):
        if key in scores.notes:
            console.print(scores.notes[key], highlight=False, markup=False)
    table = Table("query", "raised by", "score", "lowered by", "score", box=SIMPLE)
    for query in ids[:QUERIES_SHOWN]:
        raising, lowering = _tops(scores, query, top).values()
        for row in range(max(len(raising), len(lowering), 1)):
            cells = [
                text
                for ranked in (raising, lowering)
                for text in ((str(ranked[row].example_id), f"{ranked[row].score:+.4g}") if row < len(ranked) else ("", ""))
            ]
            table.add_row("" if row else str(query), *cells)
        table.add_section()
    console.print(table)
    if len(ids) > QUERIES_SHOWN:
        console.print(f"The first {QUERIES_SHOWN} of {len(ids):,} queries; --output FILE.parquet keeps all.", highlight=False)
    if scores.check is not None:
        print_check(console, scores.check)
        print_ceilings(console, scores.check)
    if output is not None:
        console.print(Text(f"Scores: {output}"), soft_wrap=True)
