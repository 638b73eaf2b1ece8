"""`propel backup` and `propel restore`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bandits.terminal import bad_input
from serving.commands import AsJson, Config

if TYPE_CHECKING:
    from bandits.backup import Manifest

DAMAGED = 3
"""Exit code."""


def backup(
    to: Annotated[Path, typer.Option(help="Folder for the backup: an empty one, or that of the one before.")],
    config: Config = Path("propel.toml"),
    as_json: AsJson = False,
) -> None:
    """Copy settings, secrets, registry and log of a service, which may run meanwhile. Only what is new is copied.

    Exit codes: 0 good, 2 bad input, and the backup before is as it was, 3 made, but rows of the log were damaged before.
    """
    with bad_input("serve"):
        from bandits.backup import Source, back_up
        from serving.settings import read_settings

        file = read_settings(config).file
        source = Source(config.resolve(), file.decision_points, file.registry.folder, file.serve.data)
        with _progress("Copying") as advance:
            made = back_up(source, to, progress=advance)
    damaged = {one.path: one.gaps for one in made.manifest.files if one.gaps}
    if as_json:
        typer.echo(
            json.dumps(_told(made.manifest) | {"folder": str(to), "copied_bytes": made.copied, "damaged": damaged}, indent=2)
        )
    else:
        typer.echo(f"{_words(made.manifest)}, {made.copied / 1e6:.1f} MB of it new, in {to}")
    for path, gaps in damaged.items():
        rows = ", ".join(f"{first} to {last}" for first, last in gaps)
        typer.echo(f"propel: {path}: found rows {rows} damaged or missing; expected whole ones: copied as it is", err=True)
    if damaged:
        raise typer.Exit(DAMAGED)


def restore(
    folder: Annotated[Path, typer.Argument(help="Folder of a backup.")],
    to: Annotated[Path, typer.Option(help="Folder for the service: an empty one, or one to be made.")],
    as_json: AsJson = False,
) -> None:
    """Put a service back from a backup, all of it or nothing; every file is compared with its SHA-256 first.

    Exit codes: 0 good, 2 bad input or a damaged backup, and nothing is put there, 3 put there, but damaged before the backup.
    """
    with bad_input("serve"):
        from bandits.backup import restore as put_back

        with _progress("Restoring") as advance:
            done = put_back(folder, to, progress=advance)
    if as_json:
        typer.echo(json.dumps(_told(done.manifest) | {"config": str(done.config), "wrong": done.wrong}, indent=2))
    else:
        typer.echo(f"{_words(done.manifest)}, as of {done.manifest.made_at}, in {to}\n\nStart the service:")
        typer.echo(f"  propel serve --config {done.config}")
    for one in done.wrong:
        typer.echo(f"propel: {one}: it was so when the backup was made", err=True)
    if done.wrong:
        raise typer.Exit(DAMAGED)


def _told(manifest: Manifest) -> dict[str, object]:
    """What a backup holds, for programs."""
    return {"made_at": manifest.made_at, "files": len(manifest.files), "bytes": sum(one.size for one in manifest.files)}


def _words(manifest: Manifest) -> str:
    """What a backup holds, for people."""
    return f"{len(manifest.files):,} files, {sum(one.size for one in manifest.files) / 1e6:.1f} MB"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], object]]:
    """A bar on a terminal, gone when done; yields a function to tell how many bytes are done, and how many there are."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
