"""Methods of `rl_core` beside each other: one table, and one picture of learning. Rollouts of kept policies."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bandits.terminal import bad_input
from pipelines.terminal import AsJsonObject, Seed, split

if TYPE_CHECKING:
    from pipelines.charts import Spec
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
    methods: Annotated[str, typer.Option("--methods", help="Comma-separated: methods of one family, or settings such as DAPO.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for compare.csv and compare.svg.")],
    task: Annotated[
        str | None,
        typer.Option("--task", help="addition or fillers; of offline methods comma-separated sets of the pendulum, or files."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of every method, on all data.")] = 3,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, help="Steps of a run: 160; offline 6,000; online 20,000 and imitation 30,000, of the environment."
        ),
    ] = None,
    sync: Annotated[
        int | None, typer.Option("--sync-interval", min=1, help="Of language models: steps until the sampler is refreshed; 1.")
    ] = None,
    width: Annotated[int, typer.Option("--width", min=1, help="Control: of two hidden layers.")] = 64,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Control: rows of a step, from a log or from replay.")] = 128,
    env: Annotated[str | None, typer.Option("--env", help="Offline: where policies from files are judged.")] = None,
    references: Annotated[
        str | None, typer.Option("--references", help="Control: returns of score 0 and 100 there: LOW,HIGH, or D4RL's by name.")
    ] = None,
    folder: Annotated[Path, typer.Option("--folder", help="Where finished runs are kept, and read from.")] = Path(".verify/rl"),
    as_json: AsJsonObject = False,
) -> None:
    """Train by several methods of one family, and draw how each learns: against rollouts or steps, and against CPU seconds."""
    from rich.console import Console
    from rich.table import Table

    with bad_input("dev"):
        from ope.data import InputError
        from pipelines.charts import drawn
        from rl_core.registry import named

        names = list(dict.fromkeys(split(methods, keep_parentheses=True) or []))
        asked = {name: named(name) for name in names}
        terminal = Console(stderr=True)

        def tell(text: str) -> None:
            terminal.print(text, style="dim")

        family = _family(asked)
        if family != "offline" and env is not None:
            raise InputError(f"--env: found {env} and methods of the {family} family; expected none: files alone need it")
        if family != "token" and sync is not None:
            raise InputError(f"--sync-interval: found {sync} and methods of the {family} family; expected none")
        if family in ("token", "imitation") and references is not None:
            raise InputError(f"--references: found {references} and methods of the {family} family; expected none")
        if family == "imitation":
            from pipelines.rl_control import AskedImitation, compared

            if task not in (None, "pendulum"):
                raise InputError(f"--task: found {task!r}; expected pendulum, whose expert is in closed form")
            table, spec = compared(AskedImitation(asked, seeds, 30_000 if steps is None else steps, width, batch), folder, tell)
        elif family == "online":
            from pipelines.rl_control import AskedOnline, compared, referenced

            data = named_once("pendulum" if task is None else task)
            table, spec = compared(
                AskedOnline(asked, data, seeds, 20_000 if steps is None else steps, width, batch, referenced(references)),
                folder,
                tell,
            )
        elif family == "offline":
            from pipelines.rl_control import PAIR, Asked, compared, referenced

            data = named_once(PAIR if task is None else task)
            wanted = Asked(asked, data, seeds, 6000 if steps is None else steps, width, batch, env, referenced(references))
            table, spec = compared(wanted, folder, tell)
        else:
            table, spec = _tokens(
                asked, "addition" if task is None else task, seeds, 160 if steps is None else steps, sync or 1, folder, tell
            )
        to.mkdir(parents=True, exist_ok=True)
        (to / "compare.svg").write_text(drawn({"learning": spec})["learning"])
        with (to / "compare.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    if as_json:
        typer.echo(json.dumps(table, indent=2))
        return
    shown = Table(*table[0], box=None, header_style="bold", pad_edge=False)
    for row in table:
        shown.add_row(
            *("" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values())
        )
    Console(width=None if Console().is_terminal else 160).print(shown)
    typer.echo(f"wrote {to / 'compare.csv'} and {to / 'compare.svg'}")


def named_once(text: str) -> list[str]:
    """Comma-separated names, each once, in their order."""
    return list(dict.fromkeys(split(text) or []))


def _family(asked: Mapping[str, Any]) -> str:
    """The one family of all methods. Raises InputError."""
    from ope.data import InputError
    from rl_core.registry import family_of

    found = {name: family_of(type(method)) for name, method in asked.items()}
    kinds = set(found.values())
    if len(kinds) != 1:
        said = ", ".join(f"{name} of the {family} family" for name, family in found.items()) or "none"
        raise InputError(f"--methods: found {said}; expected methods of one family")
    return kinds.pop()


def _tokens(
    asked: Mapping[str, Any], task: str, seeds: int, steps: int, sync: int, folder: Path, tell: Callable[[str], object]
) -> tuple[list[dict[str, Any]], Spec]:
    """Where methods end that learn the small model, and the picture. Raises InputError for an unknown task."""
    from ope.data import InputError
    from pipelines.charts import learning
    from rl_core.trainers.token import Schedule
    from rl_core.verify.arms import Arms
    from rl_core.verify.token import TASKS, TokenArm

    if task not in TASKS:
        raise InputError(f"--task: found {task!r}; expected {' or '.join(TASKS)}")
    schedules = [Schedule(steps=steps, sync_interval=sync, seed=seed, eval_every=max(steps // 8, 1)) for seed in range(seeds)]
    arms = [TokenArm(method, task, schedule) for method in asked.values() for schedule in schedules]
    found = Arms(folder, tell).run(arms)
    runs = {name: found[place * seeds : (place + 1) * seeds] for place, name in enumerate(asked)}
    points = [point for name, some in runs.items() for point in averaged(name, some)]
    return [ends(name, some) for name, some in runs.items()], learning(points, MEASURES)


def rollouts(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `train --out` wrote.")],
    to: Annotated[Path, typer.Option("--to", help="Parquet file of the log; must be new.")],
    by: Annotated[int, typer.Option("--by", help="Step of the kept policy that samples.")] = 0,
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
        from rl_core.trainers.checkpoints import load_checkpoint
        from rl_core.trainers.token import kept, roll_out
        from rl_core.verify.token import task_of

        policies = dict[int, LM]()
        for step, path in kept(folder).items():
            policies[step] = LM()
            policies[step].load_state_dict(torch.load(path, weights_only=True))
        if by not in policies:
            raise InputError(f"--by: found {by}; expected a step of which the policy was kept: {', '.join(map(str, policies))}")
        about = load_checkpoint(folder)["about"]
        temperature = about["schedule"]["temperature"]
        found = roll_out(policies[by], task_of(about), prompts, responses, torch.Generator().manual_seed(seed), temperature)
        length = found.mask.sum(dim=1).tolist()

        def lists(values: Any) -> list[list[float]]:
            return [row[:count] for row, count in zip(values.tolist(), length, strict=True)]

        columns = {f"step_{step}": lists(target_logps(policy, found, temperature)) for step, policy in policies.items()}
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
