"""`propel rl promote`: a policy of control takes the place of another where held-out transitions say that it is better."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bandits.terminal import bad_input
from pipelines.terminal import AsJsonObject, Seed, progress

if TYPE_CHECKING:
    from rl_core.promotion import Verdict
    from rl_core.trainers.offline import Act

REFUSED = 1
"""Exit code where the candidate stays where it is."""

HISTORY = "promotions.jsonl"
"""Of a folder, one line for each policy that came to serve there."""


def promote(
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="What `train --out` wrote.")],
    over: Annotated[Path, typer.Option("--over", help="Folder of the policy that serves now.")],
    data: Annotated[str, typer.Option("--data", help="Transitions that taught neither: a file, or a set such as pend-eps60.")],
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder that the policy is copied to if it is better; may be that of --over.")
    ] = None,
    discount: Annotated[float, typer.Option("--discount", min=0.0, max=0.9999, help="Of the values that are compared.")] = 0.99,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of a fit: enough that backups cover the horizon.")] = 10_000,
    fits: Annotated[int, typer.Option("--fits", min=3, help="Of either policy, from seeds of their own.")] = 5,
    width: Annotated[int, typer.Option("--width", min=1, help="Of the critic's two hidden layers.")] = 64,
    level: Annotated[float, typer.Option("--level", min=0.5, max=0.9999, help="Of the one-sided interval.")] = 0.95,
    seed: Seed = 0,
    as_json: AsJsonObject = False,
) -> None:
    """Compare two policies by paired fitted Q evaluation on held-out transitions; exit code 1 where the candidate is not better.

    Never by two separate values: errors that both share cancel in a pair. Nothing is promoted where values leave what rewards
    allow, where fits do not reach over the horizon, or where the candidate acts beyond the data.
    """
    with bad_input("rl,jobs"):
        from rl_core.fqe import FQE
        from rl_core.promotion import compared
        from rl_core.trainers.checkpoints import alone, load_checkpoint
        from rl_core.verify.control import transitions

        with alone(to):  # nobody trains there, or promotes, while this is decided
            held_out, settings = transitions(data, seed), FQE(discount=discount, steps=steps, width=width, seed=seed)
            kept = {folder: load_checkpoint(folder) for folder in (candidate, over)}  # read once: this is judged, and installed
            policies = [deterministic(folder, content) for folder, content in kept.items()]
            for folder, content in kept.items():
                untaught(folder, content["about"], data, seed)
            with progress("Fitting") as advance:
                verdict = compared(policies[0], policies[-1], held_out, settings, fits=fits, level=level, progress=advance)
            told = {"candidate": str(candidate), "over": str(over), "data": data, "discount": discount, **described(verdict)}
            if verdict.promotes and to is not None:
                install(kept[candidate], to, told)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        typer.echo(
            f"difference {told['difference']:+.3f} +- {told['stderr']:.3f}, above {told['low']:+.3f} at {level:.0%}; "
            f"{told['starts']} starts, {fits} fits of either; {told['beyond']:.1%} of actions beyond the data"
        )
        for reason in verdict.reasons:
            typer.echo(f"not to be believed: {reason}")
        where = f": copied to {to}" if verdict.promotes and to is not None else ""
        typer.echo(f"promoted{where}" if verdict.promotes else "not promoted")
    raise typer.Exit(0 if verdict.promotes else REFUSED)


def deterministic(folder: Path, kept: Mapping[str, Any]) -> Act:
    """The policy of a run. Raises InputError for a mixture, which no single action at an observation stands for."""
    from ope.data import InputError
    from rl_core.trainers.control import policy_of
    from rl_core.trainers.imitation import MixturePolicy

    found = policy_of(kept)
    if isinstance(found, MixturePolicy):
        raise InputError(f"{folder}: found a mixture, of which each episode has one learner; expected a policy of observations")
    return found


def untaught(folder: Path, about: Mapping[str, Any], data: str, seed: int) -> None:
    """Raises InputError where these transitions taught the policy: they would flatter it.

    Sets of the pendulum of one seed share episodes; of files, the same bytes are the same, and nothing else is seen.
    """
    from ope.data import InputError
    from rl_core.envs.pendulum import SETS
    from rl_core.verify.control import content_of

    taught = about.get("data")
    same = taught in SETS and about["schedule"]["seed"] == seed if data in SETS else taught == content_of(data)
    if same:
        drawn = f" of seed {seed}" if data in SETS else ""
        raise InputError(f"--data: found {data}{drawn}, which taught {folder}; expected episodes that it has not seen")


def described(verdict: Verdict) -> dict[str, Any]:
    """As JSON says it."""
    one = verdict.paired
    return {
        "promotes": verdict.promotes, "difference": one.difference, "stderr": one.stderr, "low": one.low, "level": one.level,
        "starts": one.n, "fits": one.fits, "beyond": verdict.beyond, "reasons": list(verdict.reasons),
    }  # fmt: skip


def install(kept: Mapping[str, Any], to: Path, told: dict[str, Any]) -> None:
    """The checkpoint with what it came in by, whole or not at all; then its metrics, and a line in the history."""
    from rl_core.trainers.checkpoints import CHECKPOINT, save, write_metrics

    record = told | {"at": datetime.now(UTC).isoformat(timespec="seconds")}
    save(to / CHECKPOINT, dict(kept) | {"promotion": record})
    write_metrics(to, kept["rows"])
    with (to / HISTORY).open("a") as file:
        file.write(json.dumps(record) + "\n")
