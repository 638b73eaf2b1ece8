"""Methods of `rl_core` beside each other: one table, and one picture of learning."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bandits.terminal import bad_input
from pipelines.terminal import AsJsonObject, Seed, split

if TYPE_CHECKING:
    from rl_core.trainers.checkpoints import Rows

MEASURES: Mapping[str, str] = {
    "pass_at_1": "pass@1",
    "reward": "reward",
    "length": "length",
    "entropy": "entropy",
    "ess": "ESS",
    "clipped": "clip share",
}
"""What is drawn of a run, in this order."""

WINDOW = 5
"""Steps of which a point of a line is the mean; pass@1 is measured seldom, and drawn as it is."""


def compare(
    methods: Annotated[str, typer.Option("--methods", help="Comma-separated: methods, or settings with names such as DAPO.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for compare.csv and compare.svg.")],
    task: Annotated[str, typer.Option("--task", help="addition or fillers.")] = "addition",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of every method.")] = 3,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps of a run.")] = 160,
    sync: Annotated[int, typer.Option("--sync-interval", min=1, help="Steps until the sampler is refreshed.")] = 1,
    folder: Annotated[Path, typer.Option("--folder", help="Where finished runs are kept, and read from.")] = Path(".verify/rl"),
    as_json: AsJsonObject = False,
) -> None:
    """Train the small model by several methods, and draw how each learns against rollouts and CPU seconds."""
    from rich.console import Console
    from rich.table import Table

    with bad_input("dev"):
        from ope.data import InputError
        from pipelines.charts import drawn, learning
        from rl_core.registry import named
        from rl_core.trainers.token import Schedule
        from rl_core.verify.arms import Arms
        from rl_core.verify.token import TASKS, TokenArm

        names = list(dict.fromkeys(split(methods, keep_parentheses=True) or []))
        if task not in TASKS or not names:
            raise InputError(f"found --task {task!r}, --methods {methods!r}; expected {' or '.join(TASKS)}, and methods")
        asked = {name: named(name) for name in names}
        terminal = Console(stderr=True)
        schedules = [Schedule(steps=steps, sync_interval=sync, seed=seed, eval_every=max(steps // 8, 1)) for seed in range(seeds)]
        arms = [TokenArm(method, task, schedule) for method in asked.values() for schedule in schedules]
        found = Arms(folder, lambda text: terminal.print(text, style="dim")).run(arms)
        runs = {name: found[place * seeds : (place + 1) * seeds] for place, name in enumerate(asked)}
        table = [ends(name, some) for name, some in runs.items()]
        to.mkdir(parents=True, exist_ok=True)
        points = [point for name, some in runs.items() for point in averaged(name, some)]
        (to / "compare.svg").write_text(drawn({"learning": learning(points, MEASURES)})["learning"])
        with (to / "compare.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    if as_json:
        typer.echo(json.dumps(table, indent=2))
        return
    shown = Table(*table[0], box=None, header_style="bold", pad_edge=False)
    for row in table:
        shown.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=None if Console().is_terminal else 160).print(shown)
    typer.echo(f"wrote {to / 'compare.csv'} and {to / 'compare.svg'}")


def rollouts(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `train --out` wrote.")],
    to: Annotated[Path, typer.Option("--to", help="Parquet file of the log; must be new.")],
    by: Annotated[int, typer.Option("--by", help="Step of the kept policy that samples.")] = 0,
    task: Annotated[str, typer.Option("--task", help="addition or fillers.")] = "addition",
    prompts: Annotated[int, typer.Option("--prompts", min=2, help="How many prompts.")] = 400,
    responses: Annotated[int, typer.Option("--responses", min=1, help="Of each.")] = 8,
    seed: Seed = 0,
    as_json: AsJsonObject = False,
) -> None:
    """Log responses that one kept policy of a run samples, with what every kept policy says of them: for `propel ope`."""
    with bad_input("dev"):
        import torch

        from ope.data import InputError
        from pipelines.rollouts import BEHAVIOR, write_rollouts
        from rl_core.bridge import target_logps
        from rl_core.models.lm import LM
        from rl_core.trainers.token import kept, roll_out
        from rl_core.verify.token import TASKS

        policies = dict[int, LM]()
        for step, path in kept(folder).items():
            policies[step] = LM()
            policies[step].load_state_dict(torch.load(path, weights_only=True))
        if by not in policies or task not in TASKS:
            raise InputError(
                f"found --by {by}, --task {task!r}; expected a step of {', '.join(map(str, policies))}, and {' or '.join(TASKS)}"
            )
        found = roll_out(policies[by], TASKS[task], prompts, responses, torch.Generator().manual_seed(seed))
        length = found.mask.sum(dim=1).tolist()

        def lists(values: Any) -> list[list[float]]:
            return [row[:count] for row, count in zip(values.tolist(), length, strict=True)]

        columns = {f"step_{step}": lists(target_logps(policy, found)) for step, policy in policies.items()}
        tokens = found.tokens[:, found.prompt_tokens :]
        write_rollouts(to, {
            "group": found.group.tolist(), "policy": [f"step_{by}"] * len(found), "reward": found.reward.tolist(),
            "response": lists(tokens), BEHAVIOR: lists(found.logp), **columns,
        })  # fmt: skip
    if as_json:
        typer.echo(json.dumps({"log": str(to), "rows": len(found), "by": f"step_{by}", "policies": list(columns)}))
        return
    typer.echo(f"wrote {to}: {len(found):,} responses of step_{by}. Now: propel ope --log {to} --policy {','.join(columns)}")


def ends(name: str, runs: Sequence[Rows]) -> dict[str, Any]:
    """Where a method's runs end: means over seeds, pass@1 with its standard error over seeds (none for one)."""
    last = [run[-1]["pass_at_1"] for run in runs]
    mean = sum(last) / len(last)
    error = (sum((one - mean) ** 2 for one in last) / (len(last) - 1) / len(last)) ** 0.5 if len(last) > 1 else None
    told = {measure: _mean([row for run in runs for row in run[-10:]], measure) for measure in MEASURES if measure != "pass_at_1"}
    costs = {cost: sum(run[-1][cost] for run in runs) / len(runs) for cost in ("rollouts", "cpu_seconds")}
    return {"method": name, "seeds": len(runs), "pass_at_1": mean, "stderr": error, **told, **costs}


def averaged(name: str, runs: Sequence[Rows]) -> list[dict[str, Any]]:
    """Points of a method's lines: the mean over seeds of each measure, its lowest and its highest."""
    points = []
    for end in range(0, len(runs[0]), WINDOW):
        some = [run[max(end - WINDOW + 1, 0) : end + 1] for run in runs]
        point = {"method": name} | {cost: sum(run[end][cost] for run in runs) / len(runs) for cost in ("rollouts", "cpu_seconds")}
        for measure in MEASURES:
            values = [value for rows in some if (value := _mean(rows, measure)) is not None]
            if len(values) == len(runs):
                point |= {measure: sum(values) / len(values), f"{measure}_low": min(values), f"{measure}_high": max(values)}
        points.append(point)
    return points


def _mean(rows: Sequence[Mapping[str, float]], measure: str) -> float | None:
    """Mean of a measure over the steps that have it."""
    names = ("clipped_up", "clipped_down") if measure == "clipped" else (measure,)
    found = [sum(row.get(name, 0.0) for name in names) for row in rows if any(name in row for name in names)]
    return sum(found) / len(found) if found else None
