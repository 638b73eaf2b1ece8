"""`propel rl data`: data sets of transitions made by our own training, and what any file of them holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bandits.terminal import bad_input
from pipelines.terminal import AsJsonObject, progress

if TYPE_CHECKING:
    from rl_core.families.offline import Transitions

data_app = typer.Typer(
    name="data", help="Transitions to learn control from: made by our own training, or looked at.", no_args_is_help=True
)

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@data_app.command()
def make(
    env: Annotated[str, typer.Argument(metavar="ENV", help="pendulum or halfcheetah.")],
    quality: Annotated[
        str,
        typer.Option("--quality", help="random, medium, replay; of the pendulum also expert and mix (10 expert episodes of 100)."),
    ],
    to: Annotated[Path, typer.Option("--to", help="Parquet file; must be new.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of episodes and of training.")] = 0,
    as_json: AsJsonObject = False,
) -> None:
    """Make a data set: by fixed policies, or by training one. Every row says who acted."""
    with bad_input("rl,jobs"):
        from ope.data import InputError
        from rl_core import data, recipes

        if to.exists() or to.suffix.lower() != ".parquet":  # before minutes of training
            raise InputError(f"--to: found {to}; expected the name of a new file that ends in .parquet")
        with progress("Making") as advance:
            found, told = recipes.make(env, quality, seed, advance)
        data.write_parquet(to, found, told)
    if as_json:
        typer.echo(json.dumps({"file": str(to), **told}, indent=2))
        return
    final = f"; the policy that learned ends at {told['final_return']:,.0f}" if "final_return" in told else ""
    typer.echo(f"wrote {to}: {len(found):,} rows, mean return of an episode {told['return']:,.0f}{final}")


@data_app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Parquet, D4RL's or Minari's HDF5, or a folder of Minari.")],
    as_json: AsJsonObject = False,
) -> None:
    """Rows, episodes, sizes, returns and how episodes end."""
    with bad_input("rl,jobs"):
        from rl_core import data

        told = described(data.read(file)) | {"made": data.remarks(file)}
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    typer.echo(f"{file}: {told['rows']:,} rows, {told['episodes']:,} episodes, obs {told['obs']}, action {told['action']}")
    typer.echo("returns: " + ", ".join(f"{name} {value:,.1f}" for name, value in told["returns"].items()))
    typer.echo(f"terminated {told['terminated']:.1%} of episodes, cut {told['truncated']:.1%}; rows by {told['policies']} policies")
    if told["made"]:
        typer.echo("made: " + ", ".join(f"{name} {value}" for name, value in told["made"].items()))


def described(found: Transitions) -> dict[str, Any]:
    """Of a data set. Shares are of its episodes, the last of which may be unfinished."""
    import numpy as np
    import torch

    from rl_core.families.offline import discounted, numbered

    episode = numbered(found)
    returns = discounted(found.reward, episode, 1.0)
    obs, action = found.sizes
    levels = torch.quantile(returns, torch.tensor(QUANTILES, dtype=returns.dtype))
    known = None if found.policy is None else np.unique(found.policy[~found.policy.isnan()].numpy())
    return {
        "rows": len(found), "episodes": len(returns), "obs": obs, "action": action,
        "returns": {f"{100 * share:g} %": float(value) for share, value in zip(QUANTILES, levels, strict=True)},
        "terminated": float(found.terminated.sum()) / len(returns), "truncated": float(found.truncated.sum()) / len(returns),
        "policies": "unknown" if known is None or not len(known) else len(known),
    }  # fmt: skip
