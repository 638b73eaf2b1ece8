"""Propel's front door: one command, each of whose subcommands loads what it needs when it is called."""

from __future__ import annotations

import json
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bandits.terminal import BAD_INPUT, bad_input
from pipelines import nightly_commands, rl, rl_data, rl_promote
from pipelines.log.commands import log_app
from pipelines.policy_commands import policy_app
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
from rl_core.commands import rl_app
from serving import backup_commands, commands

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ope.intervals import Interval

app = typer.Typer(
    name="propel",
    help="Propensity-logged policy evaluation and learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

app.add_typer(policy_app)
app.add_typer(log_app)
app.command()(nightly_commands.nightly)
app.command()(nightly_commands.report)
app.command()(nightly_commands.promote)
app.command()(commands.init)
app.command()(commands.serve)
app.command()(commands.simulate)
app.command()(backup_commands.backup)
app.command()(backup_commands.restore)
app.add_typer(commands.key_app)
rl_app.command()(rl.compare)
rl_app.command()(rl.rollouts)
rl_app.command()(rl_promote.promote)
rl_app.add_typer(rl_data.data_app)
app.add_typer(rl_app)


class IntervalKind(StrEnum):
    """Kinds of confidence interval."""

    normal = "normal"
    bootstrap = "bootstrap"
    bernstein = "bernstein"


class DesignKind(StrEnum):
    """How a reward model tells actions apart."""

    additive = "additive"
    per_action = "per_action"


class FormatKind(StrEnum):
    """Formats that `propel import` reads."""

    dsjson = "dsjson"
    open_bandit = "open-bandit"
    exposures = "exposures"


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

    A log of rollouts (a column `logp_behavior` of lists) values checkpoints: --policy names columns of their log-probabilities, and
    of several a shortlist is described. Exit codes: 0 good, 2 bad input, 3 when every requested estimate is refused.
    """
    with bad_input():
        from pipelines.evaluate import evaluate_file
        from pipelines.frame import ColumnMap
        from pipelines.rollouts import holds_rollouts

        if holds_rollouts(log):
            no_use = {
                "baseline": baseline, "context": context, "propensities": propensities, "eligible": eligible, "weight": weight,
                "actions": actions, "labels": labels,
            }  # fmt: skip
            _value_checkpoints(log, policy, estimators, level, reward, cluster, seed, as_json, force, no_use)
            return

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
    with bad_input(), progress("Evaluating") as advance:
        report = evaluate_file(
            log,
            policy,
            columns,
            baseline=baseline,
            estimators=split(estimators, keep_parentheses=True),
            interval=_interval(interval, weight_bound, reward_range, resamples, seed),
            level=level,
            k=actions,
            design=design.value,
            seed=seed,
            progress=advance,
        )
    if as_json:
        typer.echo(json.dumps(report.to_records(force=force), indent=2, allow_nan=False))
    else:
        from rich.console import Console

        from pipelines.tables import print_report

        title = f"{policy} on {log} ({report.log.n:,} rows, mean logged reward {report.log.reward_mean:.4g})"
        print_report(Console(), title, report, force=force)
    if report.refused:
        raise typer.Exit(ALL_REFUSED)
    if report.log.estimated and policy != "logging" and not as_json:
        from pipelines.evaluate import bounds_of_file
        from pipelines.tables import print_bounds

        with bad_input():
            print_bounds(Console(), bounds_of_file(log, policy, columns, k=actions))


def _value_checkpoints(
    log: Path,
    policy: str,
    estimators: str | None,
    level: float,
    reward: str,
    cluster: str | None,
    seed: int,
    as_json: bool,
    force: bool,
    no_use: Mapping[str, object],
) -> None:
    """`propel ope` on a log of rollouts. Raises InputError for options that only logs of decisions have."""
    from rich.console import Console

    from ope.data import InputError
    from pipelines.rollouts import read_rollouts
    from pipelines.tables import print_reports, print_selection

    if given := [f"--{name}" for name, value in no_use.items() if value is not None]:
        raise InputError(f"found {', '.join(given)} and a log of rollouts; expected none of them: they are of logs of decisions")
    names = split(estimators)
    found = read_rollouts(log, split(policy) or [], reward, cluster)
    reports = found.evaluate(names, level)
    if as_json:
        records = [{"policy": name} | record for name, report in reports.items() for record in report.to_records(force=force)]
        typer.echo(json.dumps(records, indent=2, allow_nan=False))
    else:
        earned = next(iter(reports.values())).log.reward_mean
        title = f"Checkpoints on {log} ({found.data.n:,} rollouts, mean reward {earned:.4g})"
        print_reports(Console(), title, reports, force=force)
        if len(reports) > 1:
            selection = found.select(None if names is None else names[0], seed)
            Console().print(f"Which k are worth paying for? Chosen on one half, valued on the other, by {selection.estimator}:")
            print_selection(Console(), selection)
    if all(report.refused for report in reports.values()):
        raise typer.Exit(ALL_REFUSED)


@app.command()
def propensities(
    log: LogFile,
    context: Annotated[str, typer.Option(help="Comma-separated columns that the logging policy looked at.")],
    to: Annotated[Path, typer.Option(help="Parquet file for the log with its estimates; must be new.")],
    action: ActionColumn = "action",
    eligible: EligibleColumn = None,
    cluster: ClusterColumn = None,
    weight: WeightColumn = None,
    actions: ActionCount = None,
    labels: Labels = None,
    seed: Seed = 0,
) -> None:
    """Estimate the propensities that a log lacks, cross-fitted and calibrated. Verdicts on it are at most caution.

    Exit codes: 0 good, 2 bad input, or a log that a fixed rule wrote.
    """
    with bad_input():
        from rich.console import Console

        from ope.data import InputError
        from pipelines.frame import ColumnMap
        from pipelines.importers.files import file_metadata, read_frame, remarks
        from pipelines.propensities import estimate_propensities, print_propensities, write

        if to.exists():
            raise InputError(f"found {to} already there; expected a new file: name another one")
        columns = ColumnMap(
            action=action, eligible=eligible, sample_weight=weight, cluster=cluster, context=tuple(split(context) or ()),
            labels=tuple(split(labels) or ()),
        ).with_remarks(remarks(log))  # fmt: skip
        frame = read_frame(log)
        found = estimate_propensities(frame, columns, source=str(log), k=actions, seed=seed)
        write(to, frame, found, metadata=file_metadata(log))
        print_propensities(Console(), found)
        typer.echo(f"{frame.height:,} rows in {to}: propel ope --log {to} --policy uniform --context {context}")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Log of another system: a file, or a folder of the Open Bandit Dataset.")],
    to: Annotated[Path, typer.Option(help="Folder for the events and the report; must be new.")],
    kind: Annotated[FormatKind | None, typer.Option("--format", help="Format of the source. Default: what it looks like.")] = None,
    decision_point: Annotated[str, typer.Option(help="Name of the decision point.")] = "imported",
    tenant: Annotated[str, typer.Option(help="Name of the tenant.")] = "imported",
    reward_name: Annotated[str, typer.Option(help="Name of the reward.")] = "reward",
    unit: Annotated[str | None, typer.Option(help="The unit (user, card): a column; dsjson: a dotted path of the context.")] = None,
    context: Annotated[str | None, typer.Option(help="Comma-separated columns of the context; dsjson: dotted paths.")] = None,
    action: Annotated[str, typer.Option(help="exposures: column of the action served.")] = "action",
    reward: Annotated[str | None, typer.Option(help="exposures: column of the outcome.")] = None,
    propensity: Annotated[str | None, typer.Option(help="exposures: column of the served action's propensity.")] = None,
    traffic: Annotated[
        str | None, typer.Option("--split", help="exposures: the split that the tool drew with, as `control=0.5,treatment=0.5`.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="exposures: column of the time.")] = None,
    decision_id: Annotated[str | None, typer.Option(help="exposures: column of the decision's id.")] = None,
    policy: Annotated[str | None, typer.Option(help="exposures: column of the policy that decided.")] = None,
    pass_probability: Annotated[str | None, typer.Option(help="exposures: column of each row's probability of being kept.")] = None,
    pass_in_label: Annotated[
        bool, typer.Option("--pass-in-label", help="dsjson: the label's probability includes that of the line being kept.")
    ] = False,
    estimated: Annotated[bool, typer.Option("--estimated", help="Propensities are estimates.")] = False,
    as_json: AsJsonObject = False,
) -> None:
    """Turn a log of another system into events, and say what it lacks.

    Exit codes: 0 something was imported (what was not is reported), 2 nothing could be.
    """
    with bad_input():
        from pipelines.importers.events import Naming
        from pipelines.importers.exposures import Exposures
        from pipelines.imports import import_log, print_import

        names = tuple(split(context) or ())
        asked = action != "action" or any(
            one is not None for one in (reward, propensity, traffic, time, decision_id, policy, pass_probability)
        )

        def table() -> Exposures:
            return Exposures(
                action=action, reward=reward, propensity=propensity, split=_shares(traffic), decision_id=decision_id, unit=unit,
                time=time, policy=policy, pass_probability=pass_probability, context=names,
            )  # fmt: skip

        naming = Naming(decision_point, tenant, reward_name, unit, names or None)
        with progress("Importing") as advance:
            report = import_log(
                source, to, naming, kind=None if kind is None else kind.value, exposures=table if asked else None,
                pass_in_label=pass_in_label, estimated=estimated,
                progress=lambda done: advance(done, source.stat().st_size),
            )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(report.to_record(), indent=2))
    else:
        from rich.console import Console

        print_import(Console(), report, to)
    if not report.files:
        raise typer.Exit(BAD_INPUT)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of events, as `propel import` writes it.")],
    to: Annotated[Path, typer.Option(help="File for DSJSON lines; a name that ends in .gz is compressed. Must be new.")],
) -> None:
    """Write events as VW's DSJSON."""
    with bad_input():
        from pipelines.exporters import to_dsjson

        typer.echo(f"{to_dsjson(folder, to):,} lines in {to}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report; made if missing.")] = Path("propel-demo"),
    live: Annotated[
        bool, typer.Option("--live", help="Instead: a real service, two days of payments over HTTP, a night between them.")
    ] = False,
) -> None:
    """Evaluate candidate policies on a real log of 10,000 decisions, and write a report. Or see the whole loop live.

    Exit codes: 0 good, 2 bad input, 3 live, where no candidate was promoted.
    """
    if live:
        with bad_input("serve,jobs"):
            from rich.console import Console

            from serving.live_demo import run_live

            raise typer.Exit(run_live(out, Console()))
    with bad_input():
        from rich.console import Console

        from pipelines.demo import run_demo

        run_demo(out, Console())


def _shares(text: str | None) -> dict[str, float]:
    """`control=0.5,treatment=0.5` as a mapping."""
    try:
        return {name: float(share) for name, _, share in (part.rpartition("=") for part in split(text) or ())}
    except ValueError:
        raise typer.BadParameter(f"found --split {text!r}; expected names and shares, such as control=0.5,treatment=0.5") from None


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
