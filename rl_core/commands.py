"""`propel rl`: methods of reinforcement learning, runs, and the experiments that verify them. Torch loads when one is called."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bandits.terminal import bad_input

if TYPE_CHECKING:
    from rl_core.verify.margins import Margin

rl_app = typer.Typer(name="rl", help="Reinforcement learning on the estimators' own arithmetic.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Name = Annotated[str, typer.Argument(metavar="METHOD", help="Name of a method, or of settings such as DAPO, in any case.")]
Folder = Annotated[Path, typer.Option("--folder", help="Where finished runs are kept, and read from.")]

FAILED = 1
"""Exit code of a verification that missed a margin."""


@rl_app.command("list")
def list_methods(json_: AsJson = False) -> None:
    """Every method: its name, family, paper and page."""
    from rl_core.registry import FAMILIES

    rows = [
        {
            "name": method.__name__,
            "family": family,
            "paper": method.paper.source,
            "title": method.paper.title,
            "spec": method.paper.spec,
        }
        for family, methods in FAMILIES.items()
        for method in methods
    ]
    if json_:
        typer.echo(json.dumps(rows, indent=2))
        return
    _table(("name", "family", "paper", "title"), rows)


@rl_app.command()
def show(method: Name, json_: AsJson = False) -> None:
    """A method's equations, and where each default is from."""
    with bad_input("rl"):
        from rl_core.config import to_table
        from rl_core.registry import named

        made = named(method)
        kind, paper, table = type(made), made.paper, to_table(made)
        if json_:
            told = {name: getattr(paper, name) for name in ("source", "title", "spec", "equations", "defaults", "differs")}
            typer.echo(json.dumps({"name": kind.__name__, **told, "settings": table}, indent=2))
            return
        typer.echo(f"{kind.__name__}: {paper.title} ({paper.source})\n")
        _table(("equation", "is"), [{"equation": name, "is": text} for name, text in paper.equations.items()])
        rows = [{"field": name, "default": _said(table[name]), "from": origin} for name, origin in paper.defaults.items()]
        _table(("field", "default", "from"), rows)
        if paper.differs:
            _table(("where sources differ", "what was taken"), [
                {"where sources differ": name, "what was taken": text} for name, text in paper.differs.items()
            ])  # fmt: skip


@rl_app.command()
def train(
    method: Name,
    out: Annotated[Path, typer.Option("--out", help="Folder of checkpoint and metrics.jsonl; a run that stopped goes on there.")],
    settings: Annotated[
        Path | None, typer.Option("--settings", help="TOML: [method], [schedule], and [collection] of what collects for itself.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="Of language models: addition, which it is, or fillers.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Of control: a set of the pendulum such as pend-mix10, or a file of transitions.")
    ] = None,
    env: Annotated[str | None, typer.Option("--env", help="Of control: pendulum, which it is, or a name of Gymnasium's.")] = None,
    evaluations: Annotated[
        int | None, typer.Option("--evaluations", min=1, help="Of control: how often the policy is judged; 10.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps; else the settings' own.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the start, and of all that is drawn.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Of control: cpu, which it is, or cuda.")] = None,
    json_: AsJson = False,
) -> None:
    """Train by a method: the small language model on a task, or a policy of control on data or in an environment."""
    from rich.console import Console
    from rich.progress import Progress

    with bad_input("rl"):
        from rl_core.registry import family_of, named

        console = Console(stderr=True)
        with Progress(transient=True, console=console, disable=not console.is_terminal) as bar:
            shown = bar.add_task("", total=None)

            def tell(done: float, total: int, told: str) -> None:
                bar.update(shown, completed=done, total=total, description=told)

            if family_of(type(named(method))) == "token":
                _refuse({"--data": data, "--env": env, "--evaluations": evaluations, "--device": device}, "they are of control")
                rows = _train_tokens(method, out, settings, task or "addition", steps, seed, tell)
                names = ("step", "rollouts", "cpu_seconds", "pass_at_1", "entropy", "ess")
            else:
                _refuse({"--task": task}, "it is of language models")
                env = env or "pendulum"
                rows = _train_control(method, out, settings, data, env, evaluations or 10, steps, seed, device or "cpu", tell)
                names = ("step", "cpu_seconds", "return", *(("score",) if env == "pendulum" else ()))
        if json_:
            typer.echo(json.dumps(rows, indent=2))
            return
        _table(names, [{name: _short(row.get(name)) for name in names} for row in rows])


def _refuse(options: Mapping[str, Any], why: str) -> None:
    """Raises InputError for options that were given and mean nothing here."""
    from ope.data import InputError

    if given := [name for name, value in options.items() if value is not None]:
        raise InputError(f"{', '.join(given)}: found with a method to which it says nothing; expected none: {why}")


Tell = Callable[[float, int, str], None]


def _train_tokens(
    method: str, out: Path, settings: Path | None, task: str, steps: int | None, seed: int | None, tell: Tell
) -> list[dict[str, float]]:
    """Imitation first, then rewards. Rows at which pass@1 was measured."""
    from ope.data import InputError
    from rl_core.settings import asked
    from rl_core.trainers.token import Trainer, run
    from rl_core.verify.token import TASKS, start

    if task not in TASKS:
        raise InputError(f"--task: found {task!r}; expected {' or '.join(TASKS)}")
    made, schedule = asked(method, settings, {"steps": steps, "seed": seed})
    tell(0, schedule.steps, "imitation")
    trainer = Trainer(made, TASKS[task], schedule, start(task, out))
    rows = run(trainer, out, lambda row: tell(row["step"], schedule.steps, f"reward {row['reward']:.3f}"))
    return [row for row in rows if "pass_at_1" in row]


def _train_control(
    method: str, out: Path, settings: Path | None, data: str | None, env: str, evaluations: int, steps: int | None,
    seed: int | None, device: str, tell: Tell,
) -> list[dict[str, float]]:  # fmt: skip
    """A row at every evaluation: the mean return of the policy, and on the pendulum its score."""
    from functools import partial

    from rl_core.envs.pendulum import SETS
    from rl_core.settings import read_tables
    from rl_core.trainers.control import course
    from rl_core.verify.control import PENDULUM, content_of, environment, judged, transitions

    given = read_tables(settings).get("schedule", {}).get("seed", 0) if seed is None else seed  # a set is drawn by the run's seed
    logged = None if data is None else transitions(data, given)
    told = {"data": "none" if data is None else data if data in SETS else content_of(data), "env": env}
    made = course(
        method,
        settings,
        data=logged,
        env=environment(env),
        steps=steps,
        seed=seed,
        evaluations=evaluations,
        told=told,
        device=device,
    )
    judge = partial(judged, seed=given, env=env)
    said = "return ?"

    def told_of(row: Mapping[str, float]) -> None:
        nonlocal said
        said = f"return {row['return']:.1f}" if "return" in row else said
        tell(row["step"], made.total, said)

    rows = made.run(judge, out, told_of)
    return rows if env == PENDULUM else [{name: value for name, value in row.items() if name != "score"} for row in rows]


@rl_app.command("eval")
def evaluate_checkpoint(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `train --out` wrote.")],
    prompts: Annotated[int | None, typer.Option("--prompts", min=1, help="Of language models: fixed prompts; 1,024.")] = None,
    episodes: Annotated[int | None, typer.Option("--episodes", min=2, help="Of control: how many; 100.")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of control: of the episodes, and of a mixture's learners; 0.")
    ] = None,
    json_: AsJson = False,
) -> None:
    """pass@1 of a checkpoint on its task, or the mean return of its policy in its environment, with the standard error."""
    with bad_input("rl"):
        from rl_core.registry import family_of, find
        from rl_core.trainers.checkpoints import load_checkpoint

        about = load_checkpoint(folder)["about"]
        if family_of(find(about["method"]["name"])) == "token":
            _refuse({"--episodes": episodes, "--seed": seed}, "they are of control")
            told, said = _evaluate_tokens(folder, prompts or 1024)
        else:
            _refuse({"--prompts": prompts}, "they are of language models")
            told, said = _evaluate_control(folder, about["env"], episodes or 100, seed or 0)
        typer.echo(json.dumps(told) if json_ else said)


def _evaluate_tokens(folder: Path, prompts: int) -> tuple[dict[str, Any], str]:
    from rl_core.models.lm import LM
    from rl_core.trainers.checkpoints import load_checkpoint
    from rl_core.trainers.token import evaluate
    from rl_core.verify.token import task_of

    kept = load_checkpoint(folder)
    task, model = task_of(kept["about"]), LM()
    model.load_state_dict(kept["trainer"]["policy"])
    value = evaluate(model, task, prompts, kept["about"]["schedule"]["temperature"])
    error = (value * (1 - value) / prompts) ** 0.5
    told = {"pass_at_1": value, "stderr": error, "prompts": prompts}
    return told, f"pass@1 {value:.3f} +- {error:.3f} (standard error over {prompts:,} prompts)"


def _evaluate_control(folder: Path, env: str, episodes: int, seed: int) -> tuple[dict[str, Any], str]:
    from rl_core.trainers.control import load_policy
    from rl_core.verify.control import PENDULUM, evaluated

    found = evaluated(load_policy(folder, episodes, seed), seed=seed, env=env, episodes=episodes)
    told = {"env": env, "return": found["return"], "stderr": found["stderr"], "episodes": episodes}
    score = f", score {found['score']:.1f}" if env == PENDULUM else ""
    told |= {"score": found["score"]} if env == PENDULUM else {}
    return told, f"return {found['return']:.1f} +- {found['stderr']:.1f} (standard error over {episodes:,} episodes){score}"


@rl_app.command()
def verify(
    method: Name,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Seeds of every arm; else as many as the method's page has.")
    ] = None,
    folder: Folder = Path(".verify/rl"),
    json_: AsJson = False,
) -> None:
    """Run a method's smallest honest experiment, and say of each margin whether it is kept. Finished arms are not run again."""
    from rich.console import Console

    with bad_input("rl"):
        from rl_core.registry import named
        from rl_core.verify.arms import Arms
        from rl_core.verify.experiments import experiment

        name = type(named(method)).__name__
        asked = experiment(name)
        count = asked.seeds if seeds is None or asked.seeds == 1 else seeds  # one: exact, there is nothing to draw
        terminal = Console(stderr=True)
        margins = asked.margins(Arms(folder, lambda text: terminal.print(text, style="dim")), range(count))
    passed = all(one.passed for one in margins)
    if json_:
        typer.echo(
            json.dumps({"name": name, "passed": passed, "seeds": count, "margins": [_told(one) for one in margins]}, indent=2)
        )
    else:
        typer.echo(f"{name}: {asked.told}; {count} seed{'' if count == 1 else 's'}")
        if count < asked.seeds:
            typer.echo(f"fewer than the page's {asked.seeds}: where a margin is on their mean, it is wider")
        _table(("margin", "required", "measured", ""), [
            {"margin": one.name, "required": one.required, "measured": one.measured, "": "pass" if one.passed else "FAIL"}
            for one in margins
        ])  # fmt: skip
    raise typer.Exit(0 if passed else FAILED)


def _told(margin: Margin) -> dict[str, Any]:
    return {name: getattr(margin, name) for name in ("name", "required", "measured", "passed")}


def _said(value: Any) -> str:
    """A field's value; a record as it is written."""
    if not isinstance(value, Mapping):
        return str(value)
    inner = ", ".join(f"{name}={_said(one)}" for name, one in value.items() if name != "kind")
    return f"{value['kind']}({inner})"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _table(names: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Rows in columns, as the other commands print them."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*names, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(str(row[name]) for name in names))
    Console(width=None if Console().is_terminal else 160).print(table)
