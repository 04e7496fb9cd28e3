"""``retrograd demo``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from retrograd.cli.console import errors_as_messages, print_ceilings, print_check, progress_bars


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page and the run.")] = Path("demo"),
) -> None:
    """Record a small training run, explain what it gets wrong, check that by retraining, and write a page."""
    with errors_as_messages():
        import torch

        from retrograd.demo import run_demo

        torch.set_num_threads(1)  # matrices of 64 × 64: a second thread waits more than it works
        with progress_bars():
            result = run_demo(output)
    console = Console()
    console.print(
        f"Trained on {result.trained:,} digits in {result.steps} steps; {result.wrong} of {result.tested} test images wrong. "
        f"Asked about {result.queries}, checked on {result.subsets} retrained models: {result.counterfactual}. "
        "Predicted against actual:",
        highlight=False,
    )
    table = Table("method", "r [95 % interval]", "rank r [95 % interval]", "took", box=SIMPLE)
    for method in result.methods:
        both = [f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in (method.correlation, method.rank_correlation)]
        table.add_row(method.name, *map(Text, both), f"{method.seconds:.1f} s")  # to a str, rich would read [...] as a style
    console.print(table)
    for method in result.methods:
        console.print(Text(method.name, style="bold"))
        print_check(console, method.check)
    print_ceilings(console, result.methods[0].check)  # they come from the retrainings, which all methods share
    console.print(f"Roughness: {result.roughness}.", highlight=False)
    console.print(f"Took {result.seconds['total']:.0f} s. The page: {result.page}", highlight=False, soft_wrap=True)
