"""`propel init`, `propel serve`, `propel simulate` and `propel key`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer

from bandits.terminal import bad_input

Config = Annotated[Path, typer.Option(help="Settings file.", envvar="PROPEL_CONFIG")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

key_app = typer.Typer(name="key", help="Keys of the service.", no_args_is_help=True)


def init(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    as_json: AsJson = False,
) -> None:
    """Make a folder from which the service starts: settings, a decision point with five actions, secrets, a first key.

    Exit codes: 0 good, 2 bad input.
    """
    from serving.setup import initialise

    with bad_input("serve"):
        made = initialise(folder, port)
    if as_json:
        told = {"config": str(made.config), "key": made.key, "decision_point": made.decision_point, "url": made.url}
        typer.echo(json.dumps(told, indent=2))
        return
    typer.echo(
        f"Settings: {made.config}\nKey, shown this once: {made.key}\n\nStart the service:\n  propel serve --config {made.config}\n"
        f"Then ask it:\n  curl -H 'Authorization: Bearer {made.key}' -d '{{\"context\": {{}}}}' "
        f"{made.url}/v1/{made.decision_point}/decisions"
    )


def serve(config: Config = Path("propel.toml")) -> None:
    """Serve decisions until told to end (SIGTERM, Ctrl-C); requests under way are finished.

    Exit codes: 0 ended, 1 the port is taken, 2 bad input, 74 the disk did not confirm a write.
    """
    with bad_input("serve"):
        from serving.server import run
        from serving.settings import read_settings

        raise typer.Exit(run(read_settings(config)))


def simulate(
    url: Annotated[str, typer.Option(help="Address of the service.")] = "http://127.0.0.1:8080",
    key: Annotated[str, typer.Option(help="Key with the scopes decide and reward.", envvar="PROPEL_KEY")] = "",
    payments: Annotated[int, typer.Option(min=2, help="How many are made.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the world and its payments.")] = 0,
    drift: Annotated[float, typer.Option(min=0, help="How far issuers have moved since, as a spread.")] = 0.0,
    second: Annotated[float, typer.Option(min=0, help="Seconds that one of the world takes; 0: results come at once.")] = 1e-4,
    ledger: Annotated[Path | None, typer.Option(help="File to note every decision in, for `propel log audit --ledger`.")] = None,
    print_point: Annotated[bool, typer.Option("--print-point", help="Print the decision point that it asks, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Drive a service with simulated card payments: each asks for its route, and its result is reported when it comes.

    Exit codes: 0 good, 2 bad input, or a service that refuses.
    """
    with bad_input("serve"):
        from bandits.simulators.payments import POINT
        from ope.data import InputError
        from serving.client import ClientError
        from serving.simulated import noting, simulated

        if print_point:
            typer.echo(POINT.strip())
            return
        try:
            with contextlib.nullcontext() if ledger is None else noting(ledger) as noted:
                driven, true = simulated(url, key, payments, seed, drift, second, noted)
        except ClientError as error:
            raise InputError(f"{url}: found {error}; expected a service with the decision point of --print-point") from None
    told = {
        "payments": len(driven.served), "served": sum(driven.served), "authorised": driven.rate, "stderr": driven.stderr,
        "true": true, "seconds": round(driven.seconds, 2),
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    typer.echo(
        f"{told['payments']:,} payments, {told['served']:,} served, in {driven.seconds:.1f} s; authorised {driven.rate:.4f} "
        f"(± {1.96 * driven.stderr:.4f}), truly {true:.4f}"
    )


@key_app.command("add")
def add(
    scopes: Annotated[str, typer.Option(help="Comma-separated: decide, reward, read.")] = "decide,reward",
    tenant: Annotated[str | None, typer.Option(help="Tenant. Default: that of the settings.")] = None,
    expires: Annotated[str | None, typer.Option(help="Date, UTC, from which on it is not valid.", metavar="YYYY-MM-DD")] = None,
    config: Config = Path("propel.toml"),
    as_json: AsJson = False,
) -> None:
    """Make a key, and print it this once. A running service takes it within seconds.

    Exit codes: 0 good, 2 bad input.
    """
    with bad_input("serve"):
        from ope.data import InputError
        from serving.access import SCOPES
        from serving.settings import read_settings
        from serving.setup import add_key

        settings = read_settings(config)
        wanted = tuple(scope for scope in SCOPES if scope in [part.strip() for part in scopes.split(",")])
        if len(wanted) != len(scopes.split(",")):
            raise InputError(f"found scopes {scopes!r}; expected some of {', '.join(SCOPES)}")
        whose, day = tenant or settings.file.tenant, None if expires is None else _day_to_come(expires)
        key = add_key(settings.data, whose, wanted, day)
    if as_json:
        told = {"key": key, "prefix": key.split("_")[1], "tenant": whose, "scopes": wanted, "expires": day}
        typer.echo(json.dumps(told, indent=2))
        return
    typer.echo(key)


def _day_to_come(expires: str) -> str:
    """A date as it is kept. Raises InputError for one on which a key would not be valid any more."""
    import datetime as dt

    from ope.data import InputError

    today = dt.datetime.now(dt.UTC).date()
    try:
        day = dt.date.fromisoformat(expires)
    except ValueError:
        raise InputError(f"found --expires {expires!r}; expected a date such as {today.year + 1}-01-31") from None
    if day <= today:
        raise InputError(f"found --expires {day}, from which on the key is not valid; expected a date after today, {today} (UTC)")
    return day.isoformat()


@key_app.command("list")
def list_(config: Config = Path("propel.toml"), as_json: AsJson = False) -> None:
    """Keys by their first part; their text is kept nowhere."""
    with bad_input("serve"):
        from serving.settings import read_settings
        from serving.setup import keys_of

        keys = keys_of(read_settings(config).data)
    if as_json:
        told = [{"prefix": key.prefix, "tenant": key.tenant, "scopes": key.scopes, "expires": key.expires} for key in keys]
        typer.echo(json.dumps(told, indent=2))
        return
    for key in keys:
        typer.echo(f"propel_{key.prefix}_...  {key.tenant}  {','.join(key.scopes)}  {key.expires or 'does not expire'}")


@key_app.command("remove")
def remove(
    prefix: Annotated[str, typer.Argument(help="First letters of the key's middle part, as `propel key list` shows it.")],
    config: Config = Path("propel.toml"),
) -> None:
    """End a key. A running service refuses it within seconds."""
    with bad_input("serve"):
        from serving.settings import read_settings
        from serving.setup import remove_key

        typer.echo(f"ended propel_{remove_key(read_settings(config).data, prefix).prefix}_...")
