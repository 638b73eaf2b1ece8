"""The first thing to see: a log that a real business wrote, candidate policies, and what each would have earned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from scipy.special import ndtri

from bandits.batch import DecisionBatch
from bandits.learners import DR, IPS, Learner, OracleGreedy, OracleSoftmax
from bandits.oracles import BoostedTrees
from bandits.reward_models import fit_scorer
from ope import Estimate, Report, evaluate
from ope.data import FloatArray, IntArray, LoggedData
from ope.estimators import ESTIMATORS
from ope.intervals import normal_quantile
from ope.nuisance import Split, cross_fit_reward, cross_splits
from ope.selection import Selection, halves, select
from ope.simulate import softmax
from pipelines.compare import report_on
from pipelines.demo_nights import Week, lines, run_week
from pipelines.importers.open_bandit import open_bandit
from pipelines.report import write_demo_report
from pipelines.tables import number, print_reports, print_selection, reasons

ITEMS, POSITIONS, FOLDS = 80, 3, 3
LEARNED: Mapping[str, Learner] = {
    "B: IPS, l2 10": IPS(l2=10.0),
    "B: IPS, l2 1000": IPS(l2=1000.0),
    "B: DR, l2 10": DR(l2=10.0),
    "B: DR, l2 1000": DR(l2=1000.0),
    "B: greedy ridge": OracleGreedy(),
    "B: softmax ridge": OracleSoftmax(),
    "B: softmax trees": OracleSoftmax(BoostedTrees(objective="logistic", trees=20, leaves=7)),
}
"""Learners that see fold A alone; what they learned is valued on fold B."""

THOMPSON = "Thompson (peeks)"
"""Item frequencies per position of the other log: a candidate that looks at data which no real candidate could have."""


@dataclass(frozen=True, slots=True, eq=False)
class Demo:
    """Everything that the demo found."""

    reports: Mapping[str, Report]
    """Candidates on the random log; values are clicks per decision, Delta is against uniform."""
    on_policy: Estimate
    """Thompson sampling's own click rate, measured while it ran."""
    reverse: Report
    """Uniform, estimated from Thompson sampling's log: the weights are too heavy."""
    reverse_weights: FloatArray
    """Its importance weights (n,)."""
    reverse_truth: Estimate
    """Uniform's own click rate, measured while it ran."""
    selection: Selection
    clicks: int
    thompson: str = THOMPSON
    """Name of the candidate that is also known by its own click rate."""


def run_demo(out: Path, console: Console) -> None:
    """Run the demo, print its tables, write report.html, estimates.csv and demo.json into `out`."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Starting")
        found = compute(lambda step: progress.update(task, description=step))
        progress.update(task, description="Drawing the report")
        path = write_demo_report(out, found, conclusion(found))
        week = run_week(out / "nights", lambda step: progress.update(task, description=step))
    print_demo(found, console)
    print_week(week, console)
    console.print(f"\nReport: [bold]{path}[/] (beside it: estimates.csv, demo.json)\n")
    console.print(conclusion(found), highlight=False)


def compute(step: Callable[[str], object]) -> Demo:
    """Every number of the demo. `step` is told what is being worked on."""
    step("Reading the logs")
    random, thompson = open_bandit("random").data, open_bandit("bts").data
    step("Fitting reward models")
    splits = cross_splits(random, FOLDS, seed=0)
    q, q_thompson = cross_fit_reward(random, ITEMS, splits=splits), cross_fit_reward(thompson, ITEMS, folds=FOLDS)
    step("Evaluating candidates")
    targets = candidates(random, thompson, q, splits)
    uniform = targets["uniform"]
    reports = {name: evaluate(random, target, q, baseline=uniform, estimators=ESTIMATORS) for name, target in targets.items()}
    step("Learning on fold A, valuing on fold B")
    reports |= learned(random)
    step("Evaluating in the other direction")
    reverse = evaluate(thompson, uniform, q_thompson, estimators=[one for one in ESTIMATORS if not one.needs.baseline])
    step("Choosing a portfolio")
    splits = learn_on_a(random)
    q_of_a = cross_fit_reward(random, ITEMS, splits=splits)
    return Demo(
        reports=reports,
        on_policy=evaluate(thompson, "logging", estimators=("IPS",))["IPS"],
        reverse=reverse,
        reverse_weights=uniform[0, 0] / thompson.propensity,
        reverse_truth=evaluate(random, "logging", estimators=("IPS",))["IPS"],
        selection=select(random, candidates(random, thompson, q_of_a, splits), q=q_of_a, by="DR", baseline=uniform),
        clicks=int(random.reward.sum()),
    )


def learned(random: LoggedData) -> dict[str, Report]:
    """Reports on fold B of the policies that `LEARNED` made of fold A, with a reward model of fold A."""
    fold_a, fold_b = (random.take(rows) for rows in halves(random))
    batch = DecisionBatch.of_log(fold_b, ITEMS)
    q = fit_scorer(None, fold_a, ITEMS).scores(batch)
    return {name: report_on(fold_b, batch, one.fit(fold_a, k=ITEMS), q, ESTIMATORS) for name, one in LEARNED.items()}


def learn_on_a(data: LoggedData) -> list[Split]:
    """Splits in which nothing that is learned saw fold B: within fold A across its own parts, then from all of A on B."""
    fold_a, fold_b = halves(data)
    inner = cross_splits(data.take(fold_a), FOLDS, seed=0)
    return [*((fold_a[train], fold_a[test]) for train, test in inner), (fold_a, fold_b)]


def candidates(random: LoggedData, thompson: LoggedData, q: FloatArray, splits: Sequence[Split]) -> dict[str, FloatArray]:
    """Policies (n, 80) on the rows of the random log. Those that learned from it did so on other rows than they act on."""
    uniform, tilted = np.full((random.n, ITEMS), 1 / ITEMS), softmax(q / q.std(axis=1, keepdims=True))
    return {
        "uniform": uniform,
        "popularity": popularity(random, splits),
        THOMPSON: frequencies(thompson)[position(random)],
        "greedy": np.eye(ITEMS)[q.argmax(axis=1)],
        "softmax": tilted,
        "half softmax": (uniform + tilted) / 2,
    }


def popularity(data: LoggedData, splits: Sequence[Split]) -> FloatArray:
    """Items in proportion to their clicks on the rows learned from, one click added to each (n, 80)."""
    policy = np.empty((data.n, ITEMS))
    for train, test in splits:
        clicks = 1 + np.bincount(data.action[train], weights=data.reward[train], minlength=ITEMS)
        policy[test] = clicks / clicks.sum()
    return policy


def frequencies(data: LoggedData) -> FloatArray:
    """How often a log showed each item in each position (3, 80): Thompson sampling ignored the user, so this is its policy."""
    shown = np.zeros((POSITIONS, ITEMS))
    np.add.at(shown, (position(data), data.action), 1)
    return np.asarray(shown / shown.sum(axis=1, keepdims=True))


def position(data: LoggedData) -> IntArray:
    """Position of each row (n,), 0 to 2: the first columns of the context are its three levels."""
    assert data.context is not None  # the importer put it there
    return np.asarray(data.context[:, :POSITIONS].argmax(axis=1))


def forecasts(found: Demo) -> list[Estimate]:
    """Every estimator's value of Thompson sampling, from the random log."""
    return [estimate for estimate in found.reports[THOMPSON].estimates if estimate.estimator != "Delta"]


def conclusion(found: Demo) -> str:
    """One paragraph: what these few clicks can tell, and what they cannot."""
    own, rate = found.on_policy.value, found.reverse_truth.value
    half = (found.reverse_truth.high - found.reverse_truth.low) / 2
    missed = [e.estimator for e in forecasts(found) if not e.low <= own <= e.high]
    deltas = {name: report["Delta"] for name, report in found.reports.items() if name != "uniform"}
    clear = [name for name, delta in deltas.items() if delta.verdict == "trust" and not delta.low <= 0 <= delta.high]
    weak = [f"{name} on {r.weights.ess:,.0f} effective rows" for name, r in found.reports.items() if r.weights.ess < 200]
    z = normal_quantile(0.95) + float(ndtri(0.8))
    needed = z**2 * 2 * rate * (1 - rate) / (0.1 * rate) ** 2  # per arm, 80 % power, two-sided 5 %
    return (
        f"What {found.clicks} clicks can tell: uniform's click rate is {rate:.2%}, give or take {half:.2%}. "
        f"Thompson sampling's own rate, {own:.2%}, is inside every interval forecast from the uniform log"
        f"{' but that of ' + ', '.join(missed) if missed else ''}: a passed test, though a weak one, the intervals being wide. "
        "The other direction has no answer: Thompson sampling rarely shows most items, so a handful of rows would decide "
        "uniform's value, and the estimate is refused. What they cannot tell: which candidate is best. "
        f"{'Only ' + ', '.join(clear) + ' differs' if clear else 'No trusted estimate differs'} from uniform by more than "
        "chance at 95 %"
        f"{', and some rest on next to nothing (' + '; '.join(weak) + ')' if weak else ''}. "
        f"An A/B test finds a difference of a tenth of this rate four times in five with {round(needed, -4):,.0f} decisions "
        f"per arm; this log has {found.reverse_truth.n:,}. Rows are taken as independent, since the sample names no users."
    )


def print_demo(found: Demo, console: Console) -> None:
    """The demo's tables on a terminal."""
    n = found.reverse_truth.n
    console.print(f"\n{n:,} decisions of a uniform policy: 80 items, 3 positions, {found.clicks} clicks\n", style="bold")
    title = "1. What would each candidate have earned, in clicks per decision? Delta: against uniform. B: learned on fold A"
    print_reports(console, f"{title}, valued on fold B", found.reports, reasons_of=("DR",))
    console.print("- What speaks against the other estimators stands in the report.")
    own = found.on_policy
    console.print(
        f"\n[bold]2. Check: Thompson sampling's own click rate was {number(own.value)} ± {own.stderr:.2g}. "
        "Forecast from the random log:[/]",
        highlight=False,
    )
    for forecast in forecasts(found):
        console.print(f"  {_agreement(forecast, own)}", highlight=False)
    console.print("\n[bold]3. The other direction: uniform, from Thompson sampling's log[/]")
    verdicts = [estimate.verdict for estimate in found.reverse.estimates]
    console.print(
        f"  {verdicts.count('refused')} of {len(verdicts)} estimates are refused, their numbers withheld:", highlight=False
    )
    for reason in reasons({"uniform": found.reverse}):
        console.print(f"  - {reason}", highlight=False)
    console.print(
        f"\n[bold]4. Which k would be worth an A/B test? Ranked on fold A, described on fold B, by {found.selection.estimator}[/]"
    )
    print_selection(console, found.selection)


def print_week(week: Week, console: Console) -> None:
    """The demo's nights on a terminal."""
    console.print("\n[bold]5. The same week as seven nights: ingest, join, certify, train, evaluate, select, report[/]")
    for line in lines(week):
        console.print(line, highlight=False)
    console.print(f"  The last night's page: {week.marts[-1].folder / 'report.html'}", highlight=False)


def _agreement(forecast: Estimate, own: Estimate) -> str:
    z = (forecast.value - own.value) / float(np.hypot(forecast.stderr, own.stderr))
    return (
        f"{forecast.estimator:14} {number(forecast.value)} ({number(forecast.low)} to {number(forecast.high)}), "
        f"{z:+.1f} standard errors off"
    )
