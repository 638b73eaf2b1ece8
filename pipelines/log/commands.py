"""`propel log`: verify, audit, replay and compact the service's log."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bandits.terminal import bad_input
from pipelines.terminal import AsJsonObject, progress

if TYPE_CHECKING:
    from pipelines.nightly.settings import Settings

FOUND, BUSY = 3, 4
"""Exit codes: something is wrong; a night is running."""

Config = Annotated[Path, typer.Option(help="Settings file.", envvar="PROPEL_CONFIG")]

log_app = typer.Typer(name="log", help="The service's log: whether it is whole, and what of it may go.", no_args_is_help=True)


@log_app.command("verify")
def verify(config: Config = Path("propel.toml"), as_json: AsJsonObject = False) -> None:
    """Read every record, and compare it with its checksum; look for numbers that are missing. Safe beside a running service.

    Exit codes: 0 all is there, 2 bad input, 3 something is missing or damaged.
    """
    with bad_input(), progress("Verifying") as advance:
        from bandits.log.segments import DamagedError, gaps, segment

        files, told = _files(_settings(config)), list[dict[str, Any]]()
        for done, path in enumerate(files, 1):
            missing, last, error = gaps(path), 0, None
            try:
                last = segment(path).last_row
            except DamagedError as damage:
                error = str(damage)
            told.append({"file": path.name, "last_row": last, "gaps": missing, "error": error})
            advance(done, len(files))
    bad = [one for one in told if one["gaps"] or one["error"]]
    if as_json:
        typer.echo(json.dumps({"files": told, "damaged": len(bad)}, indent=2))
    else:
        for one in told:
            ends = ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in one["gaps"])
            said = one["error"] or (f"missing or damaged: {ends}" if ends else f"{one['last_row']:,} records, all there")
            typer.echo(f"{one['file']}: {said}")
    if bad:
        raise typer.Exit(FOUND)


@log_app.command("audit")
def audit(
    ledger: Annotated[
        list[Path] | None,
        typer.Option(
            help="What a client noted: a file with one JSON object per line, with `decision_id` and `acknowledged` (true, false)."
        ),
    ] = None,
    config: Config = Path("propel.toml"),
    as_json: AsJsonObject = False,
) -> None:
    """Count attempts, records, gaps, orphans and conflicts, of the log, the lake and the clients; name what is missing.

    Exit codes: 0 all is accounted for, 2 bad input, 3 something is missing.
    """
    with bad_input(), progress("Auditing") as advance:
        from pipelines.log.audit import audit as audit_log

        settings = _settings(config)
        _known_log(settings)
        noted = [_noted(path) for path in ledger or ()]
        attempted = {id_ for one in noted for id_ in one}
        found = audit_log(
            settings, attempted=attempted if noted else None,
            acknowledged={id_ for one in noted for id_, answered in one.items() if answered}, progress=advance,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"appends": found.appends}, indent=2))
    else:
        attempts = "no client told of its attempts" if found.attempts is None else f"{found.attempts:,} attempts"
        typer.echo(
            f"{attempts}; {found.appends:,} records: {found.decisions:,} decisions, {found.rewards:,} rewards, {found.shown:,} "
            f"shown, {found.quarantined:,} quarantined, {found.compacted:,} compacted; {found.missing:,} missing, "
            f"{found.orphans:,} orphans, {found.conflicts:,} conflicts"
        )
        for one in found.files:
            typer.echo(f"{one.file}: {one.records:,} of {one.last_row:,} records, {one.in_lake:,} of them in the lake")
        typer.echo("\n".join(found.findings) or "all is accounted for")
    if found.findings:
        raise typer.Exit(FOUND)


@log_app.command("replay")
def replay(
    level: Annotated[
        int, typer.Option(min=1, max=2, help="1: actions from shares. 2: shares from requests and policies, too.")
    ] = 2,
    salts: Annotated[Path | None, typer.Option(help="Salts of the seed epochs. Default: those of the service.")] = None,
    config: Config = Path("propel.toml"),
    as_json: AsJsonObject = False,
) -> None:
    """Draw every sampled decision again from its shares and its salt, and compute its shares again from its request and policy.

    Exit codes: 0 all replay, 2 bad input, 3 some do not.
    """
    with bad_input(), progress("Replaying") as advance:
        from bandits.log.replay import judges
        from bandits.log.replay import replay as replay_log
        from bandits.log.segments import segment
        from bandits.registry import Registry
        from bandits.salts import read_salts

        settings = _settings(config)
        files = _files(settings)
        folder = settings.path(settings.file.registry.folder)
        by = judges(Registry(folder) if folder.exists() else None, settings.points) if level == 2 else None
        rows = sum(segment(path).last_row for path in files)
        found = replay_log(
            files, read_salts(salts or settings.log.parent / "salts.toml"), by, lambda done: advance(done, max(rows, done))
        )
    shares = {"actions": found.actions} | ({} if by is None else {"shares": found.vectors})
    whole = not found.wrong and not found.missing and set(shares.values()) <= {found.sampled}
    if as_json:
        told = asdict(found) | {"level": level, "replayed": {name: _share(n, found.sampled) for name, n in shares.items()}}
        typer.echo(json.dumps(told, indent=2))
    else:
        typer.echo(f"{found.decisions:,} decisions, {found.sampled:,} of them sampled")
        for name, count in shares.items():
            typer.echo(f"{name}: {count:,} replay, {100 * _share(count, found.sampled):.3f} %")
        for what, count in found.missing.items():
            typer.echo(f"{count:,} need {what}")
        for text in found.wrong:
            typer.echo(text)
    if not whole:
        raise typer.Exit(FOUND)


@log_app.command("compact")
def compact(
    older_than: Annotated[float, typer.Option(min=0, help="Days since a file was begun.")] = 7.0,
    config: Config = Path("propel.toml"),
    as_json: AsJsonObject = False,
) -> None:
    """Delete sealed files whose every record the lake holds. Repeated decisions are still answered as the first time.

    Exit codes: 0 good, 2 bad input, 4 a night is running.
    """
    with bad_input(), progress("Compacting") as advance:
        from pipelines.log.compact import compact as compact_log
        from pipelines.nightly.lake import BusyError

        try:
            settings = _settings(config)
            _files(settings)
            found = compact_log(settings, older_than_days=older_than, progress=advance)
        except BusyError as error:
            typer.echo(f"propel: {error}", err=True)
            raise typer.Exit(BUSY) from None
    if as_json:
        import msgspec

        told = {"deleted": msgspec.to_builtins(found.deleted), "bytes": found.bytes, "kept": found.kept}
        typer.echo(json.dumps(told, indent=2))
        return
    typer.echo(f"{len(found.deleted)} files deleted, {found.bytes:,} bytes")
    for name, why in sorted(found.kept.items()):
        typer.echo(f"{name} stays: {why}")


def _settings(config: Path) -> Settings:
    from pipelines.nightly.settings import read_settings

    return read_settings(config)


def _files(settings: Settings) -> list[Path]:
    """Files of the log. Raises InputError where there is none."""
    from bandits.log.files import log_files
    from ope.data import InputError

    if not (files := log_files(settings.log)):
        raise InputError(f"found no log in {settings.log}; expected files that `propel serve` wrote: see serve.data")
    return files


def _known_log(settings: Settings) -> None:
    """Raise InputError where there never was a log: one whose files are lost has its index, or a lake that read it."""
    if not (settings.log / "keys.sqlite").exists():
        _files(settings)


def _noted(path: Path) -> dict[str, bool]:
    """Ids, and whether they were answered. Raises InputError for a line that is none."""
    import msgspec

    from ope.data import InputError

    class Line(msgspec.Struct):
        decision_id: str
        acknowledged: bool

    try:
        lines = [msgspec.json.decode(line, type=Line) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a client's ledger, as `propel simulate --ledger` writes it") from None
    except msgspec.MsgspecError as error:
        raise InputError(f"{path}: found {error}; expected lines of JSON with decision_id and acknowledged") from None
    found: dict[str, bool] = {}
    for one in lines:  # answered once is answered, whatever came of a repeat
        found[one.decision_id] = found.get(one.decision_id, False) or one.acknowledged
    return found


def _share(count: int, of: int) -> float:
    return count / of if of else 1.0
