"""Propel's front door: one command, each of whose subcommands loads what it needs when it is called."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bandits.registry import Entry, Registry
    from ope.intervals import Interval

app = typer.Typer(
    name="propel",
    help="Propensity-logged policy evaluation and learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

policy_app = typer.Typer(name="policy", help="Learn policies from a log, and compare them.", no_args_is_help=True)
app.add_typer(policy_app)

BAD_INPUT, ALL_REFUSED = 2, 3

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


RegistryFolder = Annotated[Path, typer.Option(help="Folder of the registry.", envvar="PROPEL_REGISTRY")]
AsJsonObject = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Digest = Annotated[str, typer.Argument(help="Digest of the artifact, or its beginning.")]
Point = Annotated[str, typer.Argument(help="Name of the decision point.")]
Why = Annotated[str, typer.Option(help="Reason, for whoever reads the ledger later.")]
Who = Annotated[str, typer.Option(help="Who does this.", envvar="USER")]


class IntervalKind(StrEnum):
    """Kinds of confidence interval."""

    normal = "normal"
    bootstrap = "bootstrap"
    bernstein = "bernstein"


class DesignKind(StrEnum):
    """How a reward model tells actions apart."""

    additive = "additive"
    per_action = "per_action"


@app.callback(invoke_without_command=True)
def front_door(show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Propensity-logged policy evaluation and learning."""
    if show_version:
        typer.echo(f"propel {version('propel')}")
        raise typer.Exit


@app.command()
def ope(
    log: LogFile,
    policy: Annotated[
        str,
        typer.Option(
            help="Policy to value: `uniform`, `logging`, a column (a list of k probabilities per row, or one: that of the "
            "logged action) or a Parquet file with `row` and `p_0..p_{k-1}`."
        ),
    ],
    baseline: Annotated[str | None, typer.Option(help="A second policy, named alike: adds Delta, the difference to it.")] = None,
    context: Annotated[
        str | None, typer.Option(help="Comma-separated columns that the reward model is fitted on, cross-fitted; enables DM, DR.")
    ] = None,
    estimators: Annotated[
        str | None, typer.Option(help="Comma-separated, such as `IPS,SNIPS,DR,DRos(100)`. Default: those that the input allows.")
    ] = None,
    interval: Annotated[IntervalKind, typer.Option(help="Kind of confidence interval.")] = IntervalKind.normal,
    level: Annotated[float, typer.Option(help="Coverage of the interval.")] = 0.95,
    action: ActionColumn = "action",
    reward: RewardColumn = "reward",
    propensity: PropensityColumn = "propensity",
    propensities: PropensitiesColumn = None,
    eligible: EligibleColumn = None,
    cluster: ClusterColumn = None,
    weight: WeightColumn = None,
    actions: ActionCount = None,
    labels: Labels = None,
    design: Annotated[DesignKind, typer.Option(help="One reward model for all actions, or one for each.")] = DesignKind.additive,
    weight_bound: Annotated[float | None, typer.Option(help="bernstein: the largest importance weight that could occur.")] = None,
    reward_range: Annotated[str | None, typer.Option(help="bernstein: smallest and largest possible reward, as `0,1`.")] = None,
    resamples: Annotated[int, typer.Option(help="bootstrap: number of resamples, at least 1000.")] = 1000,
    seed: Seed = 0,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Value a policy on a log that another policy wrote, and say whether to believe the number.

    Exit codes: 0 good, 2 bad input, 3 when every requested estimate is refused.
    """
    with _bad_input():
        from pipelines.evaluate import FOLDS, evaluate_file
        from pipelines.frame import ColumnMap

    with _bad_input(), _progress("Fitting the reward model", FOLDS) as advance:
        log_and_report = evaluate_file(
            log,
            policy,
            ColumnMap(
                action=action,
                reward=reward,
                propensity=propensity,
                propensities=propensities,
                eligible=eligible,
                sample_weight=weight,
                cluster=cluster,
                context=tuple(_split(context) or ()),
                labels=tuple(_split(labels) or ()),
            ),
            baseline=baseline,
            estimators=_split(estimators, keep_parentheses=True),
            interval=_interval(interval, weight_bound, reward_range, resamples, seed),
            level=level,
            k=actions,
            design=design.value,
            seed=seed,
            progress=advance,
        )
    report = log_and_report.report
    if as_json:
        typer.echo(json.dumps(report.to_records(force=force), indent=2, allow_nan=False))
    else:
        from rich.console import Console

        from pipelines.tables import print_report

        data = log_and_report.log.data
        title = f"{policy} on {log} ({data.n:,} rows, mean logged reward {data.reward.mean():.4g})"
        print_report(Console(), title, report, force=force)
    if report.refused:
        raise typer.Exit(ALL_REFUSED)


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
    with _bad_input():
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
            context=tuple(_split(context) or ()),
            labels=tuple(_split(labels) or ()),
        )
        read = read_log(log, columns, k=actions)
        chosen = learners_named(_split(learners), read.data.reward)
        with _progress("Learning", len(chosen)) as advance:
            reports = compare_learners(read.data, chosen, k=read.width(actions), seed=seed, progress=advance)
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
    with _bad_input():
        store = _registry(registry)
        pointers = store.pointers()
        rows: list[dict[str, Any]] = [
            {
                "digest": digest,
                "name": manifest.name,
                "decision_point": manifest.decision_point,
                "serving": pointers[manifest.decision_point].digest == digest if manifest.decision_point in pointers else False,
                "frozen": pointers[manifest.decision_point].frozen if manifest.decision_point in pointers else False,
                "parent": manifest.parent,
            }
            for digest, manifest in store.manifests().items()
        ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo(f"No artifact in {registry}.")
    for row in rows:
        marks = " serving" * row["serving"] + " frozen" * row["frozen"]
        typer.echo(f"{row['digest'][:16]}  {row['decision_point']}  {row['name']}{marks}")


@policy_app.command()
def show(digest: Digest, registry: RegistryFolder = Path("registry"), as_json: AsJsonObject = False) -> None:
    """What an artifact is, where it came from, what was measured, and when it was served."""
    with _bad_input():
        import msgspec

        store = _registry(registry)
        found = store.find(digest)
        manifest = msgspec.to_builtins(store.manifests()[found])
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
    with _bad_input():
        justified = None if estimate is None else {"records": _json_file(estimate)}
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
    with _bad_input():
        _say(_registry(registry).rollback(decision_point, who=who, why=why, to=to), as_json)


@policy_app.command()
def freeze(
    decision_point: Point,
    why: Why,
    who: Who,
    off: Annotated[bool, typer.Option("--off", help="Allow changes again.")] = False,
    registry: RegistryFolder = Path("registry"),
    as_json: AsJsonObject = False,
) -> None:
    """Refuse every change of a decision point until it is unfrozen."""
    with _bad_input():
        _say(_registry(registry).freeze(decision_point, who=who, why=why, frozen=not off), as_json)


@policy_app.command()
def verify(registry: RegistryFolder = Path("registry"), as_json: AsJsonObject = False) -> None:
    """Check the ledger's chain, the pointers it explains and every artifact. Exit codes: 0 all well, 3 something is wrong."""
    with _bad_input():
        store = _registry(registry)
        wrong, ledger = store.verify(), store.ledger()
    head = ledger[-1].line if ledger else 0
    if as_json:
        typer.echo(json.dumps({"wrong": wrong, "ledger_lines": head}, indent=2))
    else:
        typer.echo("\n".join(wrong) if wrong else f"{head} lines of the ledger and every artifact are as they were written.")
    if wrong:
        raise typer.Exit(ALL_REFUSED)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report; made if missing.")] = Path("propel-demo"),
) -> None:
    """Evaluate candidate policies on a real log of 10,000 decisions, and write a report."""
    with _bad_input():
        from rich.console import Console

        from pipelines.demo import run_demo

        run_demo(out, Console())


def _json_file(path: Path) -> Any:
    from ope.data import InputError

    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: found {error}; expected JSON, as `propel ope --json` writes it") from None


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


def _ledger_line(line: dict[str, Any]) -> str:
    from datetime import UTC, datetime

    when = datetime.fromtimestamp(line["at_ns"] / 1e9, UTC).isoformat(timespec="seconds")
    moved = f" {(line['from_digest'] or 'nothing')[:16]} -> {line['to_digest'][:16]}" if line["to_digest"] else ""
    return f"{line['line']}  {when}  {line['action']} {line['decision_point']}{moved}  by {line['who']}: {line['why']}"


@contextmanager
def _bad_input() -> Iterator[None]:
    """Turn an error about the input into a message and exit code 2; anything else is our fault and keeps its traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        typer.echo(f"propel: {error.name} is not installed; run: pip install 'propel[jobs]'", err=True)
        raise typer.Exit(BAD_INPUT) from None
    except Exception as error:
        from ope.data import InputError

        if not isinstance(error, InputError | OSError):
            raise
        typer.echo(f"propel: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from None


@contextmanager
def _progress(what: str, steps: int) -> Iterator[Any]:
    """A bar on standard error, gone when done; yields a function to call after each step."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn(what), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=steps, visible=False)
        yield lambda: progress.update(task, advance=1, visible=True)


def _split(text: str | None, *, keep_parentheses: bool = False) -> list[str] | None:
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


def _interval(kind: IntervalKind, weight_bound: float | None, reward_range: str | None, resamples: int, seed: int) -> Interval:
    from ope.intervals import Bootstrap, EmpiricalBernstein, Normal

    if kind is IntervalKind.normal:
        return Normal()
    if kind is IntervalKind.bootstrap:
        return Bootstrap(resamples, seed)
    if weight_bound is None or reward_range is None:
        raise typer.BadParameter(
            "an empirical-Bernstein interval needs what data cannot tell: give --weight-bound, the largest importance weight "
            "that could occur, and --reward-range, such as 0,1"
        )
    try:
        low, high = (float(end) for end in reward_range.split(","))
    except ValueError:
        raise typer.BadParameter(f"found --reward-range {reward_range!r}; expected two numbers, such as 0,1") from None
    return EmpiricalBernstein(weight_bound, (low, high))


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
