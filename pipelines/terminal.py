"""What every command shares: how errors become messages, progress a bar, and the options that name a log's columns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

ALL_REFUSED = 3
"""Exit code."""

LogFile = Annotated[Path, typer.Option(help="Log of decisions: a .parquet or .csv file, one row per decision.")]
ActionColumn = Annotated[str, typer.Option(help="Column of the action taken: an index 0..k-1, or a label.")]
RewardColumn = Annotated[str, typer.Option(help="Column of the reward.")]
PropensityColumn = Annotated[str, typer.Option(help="Column of the logged action's propensity.")]
PropensitiesColumn = Annotated[str | None, typer.Option(help="Column of the logging policy's whole vector, a list per row.")]
EligibleColumn = Annotated[str | None, typer.Option(help="Column of the eligible actions, a list per row.")]
ClusterColumn = Annotated[str | None, typer.Option(help="Column of the unit (user, card) whose rows depend on each other.")]
WeightColumn = Annotated[str | None, typer.Option(help="Column of sample weights.")]
ActionCount = Annotated[int | None, typer.Option(min=1, help="Number of actions k, where the log does not show them all.")]
Labels = Annotated[str | None, typer.Option(help="Comma-separated labels of text actions, in the order of the entries of vectors.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of folds and resamples.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print a list of objects, one per estimate.")]
Force = Annotated[bool, typer.Option(help="Show the numbers of refused estimates.")]
AsJsonObject = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], object]]:
    """A bar on standard error, gone when done; yields a function to tell how much is done, and how much there is to do."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn(what), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def split(text: str | None, *, keep_parentheses: bool = False) -> list[str] | None:
    """Comma-separated names; commas inside parentheses belong to the name."""
    if text is None:
        return None
    names, depth = [""], 0
    for character in text:
        depth += keep_parentheses * ((character == "(") - (character == ")"))
        if character == "," and depth <= 0:
            names.append("")
        else:
            names[-1] += character
    return [name.strip() for name in names if name.strip()]
