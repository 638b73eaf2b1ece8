"""How errors become messages of commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

BAD_INPUT = 2
"""Exit code."""


@contextmanager
def bad_input(extra: str = "jobs") -> Iterator[None]:
    """Turn an error about the input into a message and exit code 2; anything else is our fault and keeps its traceback.

    `extra`: the part of Propel that brings the packages of the command.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        typer.echo(f"propel: {error.name} is not installed; run: pip install -e '.[{extra}]' in a clone of Propel", err=True)
        raise typer.Exit(BAD_INPUT) from None
    except Exception as error:
        from ope.data import InputError

        if not isinstance(error, InputError | OSError):
            raise
        typer.echo(f"propel: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from None
