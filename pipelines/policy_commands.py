"""`propel policy`: learn and compare policies, and run the registry that carries them to where they decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bandits.terminal import bad_input
from pipelines.terminal import (
    ALL_REFUSED,
    ActionColumn,
    ActionCount,
    AsJson,
    AsJsonObject,
    ClusterColumn,
    EligibleColumn,
    Force,
    Labels,
    LogFile,
    PropensitiesColumn,
    PropensityColumn,
    RewardColumn,
    Seed,
    WeightColumn,
    progress,
    split,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bandits.registry import Entry, Pointer, Registry

policy_app = typer.Typer(name="policy", help="Learn policies from a log, compare them, and carry them.", no_args_is_help=True)

RegistryFolder = Annotated[Path, typer.Option(help="Folder of the registry.", envvar="PROPEL_REGISTRY")]
Digest = Annotated[str, typer.Argument(help="Digest of the artifact, or its beginning.")]
Point = Annotated[str, typer.Argument(help="Name of the decision point.")]
Why = Annotated[str, typer.Option(help="Reason, for whoever reads the ledger later.")]
Who = Annotated[str, typer.Option(help="Who does this.", envvar="USER")]


@policy_app.command()
def compare(
    log: LogFile,
    context: Annotated[str, typer.Option(help="Comma-separated columns that policies may look at.")],
    learners: Annotated[
        str | None, typer.Option(help="Comma-separated, such as `IPS,DR,oracle-greedy (trees)`. Default: all.")
    ] = None,
    action: ActionColumn = "action",
    reward: RewardColumn = "reward",
    propensity: PropensityColumn = "propensity",
    propensities: PropensitiesColumn = None,
    eligible: EligibleColumn = None,
    cluster: ClusterColumn = None,
    weight: WeightColumn = None,
    actions: ActionCount = None,
    labels: Labels = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Let every learner learn on one half of a log, and value what it learned on the other half.

    Exit codes: 0 good, 2 bad input, 3 when every learned policy's estimates are refused.
    """
    with bad_input():
        from pipelines.compare import compare as compare_learners
        from pipelines.compare import learners_named
        from pipelines.frame import ColumnMap
        from pipelines.importers.files import read_log

        columns = ColumnMap(
            action=action,
            reward=reward,
            propensity=propensity,
            propensities=propensities,
            eligible=eligible,
            sample_weight=weight,
            cluster=cluster,
            context=tuple(split(context) or ()),
            labels=tuple(split(labels) or ()),
        )
        read = read_log(log, columns, k=actions)
        chosen = learners_named(split(learners), read.data.reward)
        with progress("Learning") as advance:
            reports = compare_learners(read.data, chosen, k=read.width, seed=seed, progress=advance)
    if as_json:
        records = [{"policy": name} | record for name, report in reports.items() for record in report.to_records(force=force)]
        typer.echo(json.dumps(records, indent=2, allow_nan=False))
    else:
        from rich.console import Console

        from pipelines.tables import print_reports

        title = f"Learned on one half of {log}, valued on the other; Delta: against the logging policy"
        print_reports(Console(), title, reports, force=force)
    if all(report.refused for name, report in reports.items() if name in chosen):
        raise typer.Exit(ALL_REFUSED)


@policy_app.command("list")
def list_policies(registry: RegistryFolder = Path("registry"), as_json: AsJsonObject = False) -> None:
    """Artifacts of a registry, oldest first, and where each is served."""
    with bad_input():
        store = _registry(registry)
        pointers = store.pointers()
        rows = [_row(store, digest, point, pointers) for digest, point in store.listed().items()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo(f"No artifact in {registry}.")
    for row in rows:
        marks = " serving" * row["serving"] + " frozen" * row["frozen"]
        damaged = "" if row["damaged"] is None else f" damaged: {row['damaged']}"
        typer.echo(f"{row['digest'][:16]}  {row['decision_point']}  {row['name'] or '(no name)'}{marks}{damaged}")


@policy_app.command()
def show(digest: Digest, registry: RegistryFolder = Path("registry"), as_json: AsJsonObject = False) -> None:
    """What an artifact is, where it came from, what was measured, and when it was served."""
    with bad_input():
        import msgspec

        store = _registry(registry)
        found = store.find(digest)
        manifest = msgspec.to_builtins(store.manifest(found))
        lines = [msgspec.to_builtins(entry) for entry in store.ledger() if found in (entry.from_digest, entry.to_digest)]
    if as_json:
        typer.echo(json.dumps({"digest": found, "manifest": manifest, "ledger": lines}, indent=2))
        return
    typer.echo(f"{manifest['name']}@{found}")
    for key in ("decision_point", "parent", "snapshot", "metrics"):
        typer.echo(f"{key}: {json.dumps(manifest[key])}")
    for name, file in manifest["files"].items():
        typer.echo(f"{name}: {file['size']:,} bytes, {file['format']}")
    for line in lines:
        typer.echo(_ledger_line(line))


@policy_app.command()
def promote(
    digest: Digest,
    why: Why,
    who: Who,
    estimate: Annotated[
        Path | None, typer.Option(help="JSON file of the estimate that justifies it, as `propel ope --json` writes it.")
    ] = None,
    registry: RegistryFolder = Path("registry"),
    as_json: AsJsonObject = False,
) -> None:
    """Serve an artifact at its decision point, once it has passed every check."""
    with bad_input():
        justified = None if estimate is None else {"records": _records(estimate)}
        _say(_registry(registry).promote(digest, who=who, why=why, estimate=justified), as_json)


@policy_app.command()
def rollback(
    decision_point: Point,
    why: Why,
    who: Who,
    to: Annotated[str | None, typer.Option(help="Digest of an earlier artifact. Default: the one served before.")] = None,
    registry: RegistryFolder = Path("registry"),
    as_json: AsJsonObject = False,
) -> None:
    """Serve again what was served before."""
    with bad_input():
        _say(_registry(registry).rollback(decision_point, who=who, why=why, to=to), as_json)


@policy_app.command()
def freeze(
    decision_point: Point,
    why: Why,
    who: Who,
    off: Annotated[bool, typer.Option("--off", help="Allow changes again.")] = False,
    safe: Annotated[bool, typer.Option("--safe", help="Serve the default action first, with the exploration floor.")] = False,
    config: Annotated[
        Path, typer.Option(help="Settings file; with --safe it names decision point and registry.", envvar="PROPEL_CONFIG")
    ] = Path("propel.toml"),
    registry: Annotated[Path | None, typer.Option(help="Folder of the registry.", envvar="PROPEL_REGISTRY")] = None,
    as_json: AsJsonObject = False,
) -> None:
    """Refuse every change of a decision point until it is unfrozen; with --safe, let it serve its default action meanwhile."""
    with bad_input():
        if not safe:
            _say(_registry(registry or Path("registry")).freeze(decision_point, who=who, why=why, frozen=not off), as_json)
            return
        from bandits.registry import Registry
        from bandits.safe import freeze_safe
        from ope.data import InputError
        from pipelines.nightly.settings import read_settings

        if off:
            raise InputError("found --safe with --off; expected one of them: what serves stays when a freeze is lifted")
        settings = read_settings(config)
        point = settings.point(decision_point)
        if point is None:
            known = ", ".join(point.name for point in settings.points)
            raise InputError(f"{config}: found no decision point {decision_point!r}; expected one of {known}")
        store = Registry(registry or settings.path(settings.file.registry.folder))
        entries = freeze_safe(store, point, who=who, why=why)
    _say_all(entries, as_json)


@policy_app.command()
def verify(registry: RegistryFolder = Path("registry"), as_json: AsJsonObject = False) -> None:
    """Check the ledger's chain, the pointers it explains and every artifact. Exit codes: 0 all well, 3 something is wrong."""
    with bad_input():
        from bandits.registry import DamageError

        head = 0
        try:
            store = _registry(registry)
            head = store.ledger_lines()
            wrong = store.verify()
        except DamageError as error:
            wrong = [str(error)]
    if as_json:
        typer.echo(json.dumps({"wrong": wrong, "ledger_lines": head}, indent=2))
    else:
        typer.echo("\n".join(wrong) if wrong else f"{head} lines of the ledger and every artifact are as they were written.")
    if wrong:
        raise typer.Exit(ALL_REFUSED)


@policy_app.command()
def export(
    digest: Digest,
    to: Annotated[Path, typer.Option(help="Folder for the model; must be new.")],
    report: Annotated[Path | None, typer.Option(help="JSON of estimates to go with it, as `propel ope --json` writes it.")] = None,
    registry: RegistryFolder = Path("registry"),
) -> None:
    """Write an artifact as a model that MLflow loads (`mlflow.pyfunc.load_model`), with its report as metrics."""
    with bad_input():
        from pipelines.mlflow_model import export_model

        export_model(_registry(registry), digest, to, () if report is None else _records(report))
        typer.echo(f"MLmodel, data, params.json, metrics.json and report.json in {to}")


@policy_app.command()
def prune(
    keep: Annotated[int, typer.Option(min=1, help="Number of newest artifacts to keep, beside what is served and was before.")],
    registry: RegistryFolder = Path("registry"),
    as_json: AsJsonObject = False,
) -> None:
    """Delete old artifacts that a registry no longer needs."""
    with bad_input():
        gone = _registry(registry).prune(keep)
    typer.echo(json.dumps(gone) if as_json else f"{len(gone)} artifacts deleted.")


def _row(store: Registry, digest: str, point: str, pointers: Mapping[str, Pointer]) -> dict[str, Any]:
    """What `list` says of an artifact. One that is damaged is marked, so that it hides no other."""
    from ope.data import InputError

    name = parent = damaged = None
    try:
        manifest = store.manifest(digest)
        name, parent = manifest.name, manifest.parent
    except InputError as error:
        damaged = str(error).removeprefix(f"{store.path(digest)}: ")
    return {
        "digest": digest,
        "name": name,
        "decision_point": point,
        "serving": any(pointer.digest == digest for pointer in pointers.values()),
        "frozen": pointers[point].frozen if point in pointers else False,
        "parent": parent,
        "damaged": damaged,
    }


def _records(path: Path) -> list[dict[str, Any]]:
    """Estimates in a file. Raises InputError unless it holds at least one, as `propel ope --json` writes them."""
    from ope.data import InputError
    from pipelines.mlflow_model import estimate_records

    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: found {error}; expected JSON, as `propel ope --json` writes it") from None
    records = estimate_records(found, str(path))
    if not records:
        raise InputError(f"{path}: found an empty list; expected estimates, as `propel ope --json` writes them")
    return records


def _registry(folder: Path) -> Registry:
    from bandits.registry import Registry
    from ope.data import InputError

    if not (folder / "control.sqlite").is_file():
        raise InputError(f"found no registry in {folder}; expected a folder with control.sqlite: give --registry")
    return Registry(folder)


def _say(entry: Entry, as_json: bool) -> None:
    """The line of the ledger that a command wrote."""
    import msgspec

    line = msgspec.to_builtins(entry)
    typer.echo(json.dumps(line, indent=2) if as_json else _ledger_line(line))


def _say_all(entries: list[Entry], as_json: bool) -> None:
    """The lines of the ledger that a command wrote."""
    import msgspec

    lines = [msgspec.to_builtins(entry) for entry in entries]
    typer.echo(json.dumps(lines, indent=2) if as_json else "\n".join(map(_ledger_line, lines)))


def _ledger_line(line: dict[str, Any]) -> str:
    from datetime import UTC, datetime

    when = datetime.fromtimestamp(line["at_ns"] / 1e9, UTC).isoformat(timespec="seconds")
    moved = f" {(line['from_digest'] or 'nothing')[:16]} -> {line['to_digest'][:16]}" if line["to_digest"] else ""
    return f"{line['line']}  {when}  {line['action']} {line['decision_point']}{moved}  by {line['who']}: {line['why']}"
