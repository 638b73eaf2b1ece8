"""Files of transitions in three layouts: what they become, and what is refused. Recipes: what makes them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
import torch
from torch.testing import assert_close

from ope.data import DataError, InputError
from rl_core.data import read, remarks, write_parquet
from rl_core.envs.pendulum import Pendulum, dataset, score
from rl_core.exploration import log_density
from rl_core.families.offline import Transitions, numbered
from rl_core.recipes import PENDULUM, cheetah, make, uniform_rows
from rl_core.trainers.online import UNIFORM

torch.set_num_threads(1)

Fields = dict[str, Any]


def flat(rows: int = 6) -> Fields:
    """D4RL's arrays: row t has the observation (t, -t), so that what follows is seen at once."""
    t = np.arange(rows, dtype=np.float64)
    return {
        "observations": np.stack((t, -t), axis=1),
        "actions": np.linspace(-1, 1, rows)[:, None],
        "rewards": t / 2,
        "terminals": np.zeros(rows, dtype=bool),
        "timeouts": np.zeros(rows, dtype=bool),
    }


def episode(steps: int, first: float = 0.0, *, ends: bool = False) -> Fields:
    """Minari's arrays of one."""
    t = first + np.arange(steps + 1, dtype=np.float32)
    last = np.arange(steps) == steps - 1
    return {
        "observations": np.stack((t, -t), axis=1),
        "actions": np.full((steps, 1), 0.5, dtype=np.float32),
        "rewards": np.ones(steps),
        "terminations": last & ends,
        "truncations": last & (not ends),
    }


def columns(rows: int = 4) -> Fields:
    """Of Parquet."""
    return {
        "obs": [[float(t), 0.5] for t in range(rows)],
        "action": [[0.1 * t] for t in range(rows)],
        "next_obs": [[t + 1.0, 0.5] for t in range(rows)],
        "reward": [1.0] * rows,
        "terminated": [False] * (rows - 1) + [True],
        "truncated": [0] * rows,
    }


def d4rl(path: Path, given: Fields) -> Path:
    with h5py.File(path / "flat.hdf5", "w") as file:
        for name, values in given.items():
            file[name] = values
        file["metadata/algorithm"] = "none"
    return path / "flat.hdf5"


def minari(path: Path, *episodes: Fields) -> Path:
    (path / "data").mkdir(exist_ok=True)
    with h5py.File(path / "data" / "main_data.hdf5", "w") as file:
        for place, given in enumerate(episodes):
            for name, values in given.items():
                for inner, one in values.items() if isinstance(values, dict) else [("", values)]:
                    file[f"episode_{place}/{name}/{inner}".rstrip("/")] = one
    return path


def parquet(path: Path, given: Fields) -> Path:
    pl.DataFrame(given, strict=False).write_parquet(path / "rows.parquet")
    return path / "rows.parquet"


def test_a_cut_row_of_d4rl_has_no_next_and_is_dropped(tmp_path: Path) -> None:
    given = flat(7)
    given["timeouts"][2] = True
    given["terminals"][4] = True
    data = read(d4rl(tmp_path, given))
    assert data.obs[:, 0].tolist() == [0, 1, 3, 4, 5]  # rows 2 and 6 are gone: nobody knows what followed them
    assert data.next_obs[:, 0].tolist() == [1, 2, 4, 4, 6]  # never the start of another episode
    assert data.terminated.tolist() == [0, 0, 0, 1, 0]
    assert data.truncated.tolist() == [0, 1, 0, 0, 1]
    assert numbered(data).tolist() == [0, 0, 1, 1, 2]
    assert_close(data.reward, torch.tensor([0.0, 0.5, 1.5, 2.0, 2.5]))
    assert (data.obs.dtype, data.logp_behavior, data.policy) == (torch.float32, None, None)


def test_with_next_observations_no_row_is_dropped(tmp_path: Path) -> None:
    given = flat(4) | {"next_observations": np.full((4, 2), 9.0)}
    given["timeouts"][1] = given["terminals"][3] = True
    data = read(d4rl(tmp_path, given))
    assert len(data) == 4
    assert (data.next_obs == 9).all()
    assert (data.terminated.tolist(), data.truncated.tolist()) == ([0, 0, 0, 1], [0, 1, 0, 0])


def test_a_row_that_ends_and_is_cut_keeps_its_reward(tmp_path: Path) -> None:
    given = flat(3)
    given["terminals"][2] = given["timeouts"][2] = True
    data = read(d4rl(tmp_path, given))
    assert data.reward.tolist() == [0, 0.5, 1.0]
    assert (data.terminated.tolist(), data.truncated.tolist()) == ([0, 0, 1], [0, 0, 1])
    given["timeouts"][2] = False
    assert read(d4rl(tmp_path, given)).truncated.tolist() == [0, 0, 0]


def test_episodes_of_minari_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    made = [episode(2, 100.0 * place, ends=place == 3) for place in range(11)]
    made[5]["truncations"][:] = False  # stopped without a flag: recorded is what was recorded
    folder = minari(tmp_path, *made)
    data = read(folder)
    assert data.obs[:, 0].tolist() == [value for place in range(11) for value in (100.0 * place, 100.0 * place + 1)]
    assert torch.equal(data.next_obs[:, 0], data.obs[:, 0] + 1)
    assert data.terminated.nonzero()[:, 0].tolist() == [7]
    assert data.truncated.sum() == 10
    assert torch.equal(read(folder / "data" / "main_data.hdf5").obs, data.obs)


def test_parquet_there_and_back(tmp_path: Path) -> None:
    data, told = make("pendulum", "expert", seed=3)
    data = data.rows(slice(0, 400))
    write_parquet(tmp_path / "some" / "own.parquet", data, told)
    assert [one.name for one in (tmp_path / "some").iterdir()] == ["own.parquet"]
    found = read(tmp_path / "some" / "own.parquet")
    for one in fields(data):
        if one.name != "row":
            assert_close(getattr(found, one.name), getattr(data, one.name), rtol=0, atol=0, equal_nan=True)
    assert remarks(tmp_path / "some" / "own.parquet") == told
    assert remarks(Path("x.hdf5")) == {}
    plain = replace(data, logp_behavior=None, policy=None)
    write_parquet(tmp_path / "plain.parquet", plain)
    assert read(tmp_path / "plain.parquet").policy is None
    with pytest.raises(InputError, match="expected the name of a new file"):
        write_parquet(tmp_path / "plain.parquet", plain)


def test_parquet_of_others(tmp_path: Path) -> None:
    data = read(parquet(tmp_path, columns() | {"policy": [1, None, 2, 2], "logp_behavior": [-0.5, None, 0.25, 0.0]}))
    assert data.obs[:, 0].tolist() == [0, 1, 2, 3]
    assert data.terminated.tolist() == [0, 0, 0, 1]
    assert data.policy is not None
    assert data.logp_behavior is not None
    assert data.policy.isnan().tolist() == data.logp_behavior.isnan().tolist() == [False, True, False, False]


def changed(given: Fields, name: str, row: Any, value: float) -> Fields:
    given[name] = np.array(given[name], dtype=float)
    given[name][row] = value
    return given


def listed(given: Fields, name: str, row: int, value: Any) -> Fields:
    given[name][row] = value
    return given


CASES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "not finite": (
        lambda to: d4rl(to, changed(flat(), "observations", (3, 1), np.nan)),
        ("flat.hdf5, column 'observations', row 3 (counted from 0)", "nan in entry 1", "finite numbers", "Drop the episode"),
    ),
    "too large": (lambda to: d4rl(to, changed(flat(), "rewards", 2, 1e60)), ("column 'rewards', row 2", "1e+60")),
    "wide actions": (
        lambda to: d4rl(to, changed(flat(), "actions", 4, 2.0)),
        ("column 'actions', row 4", "found 2;", "2·(action - low)/(high - low) - 1"),
    ),
    "no flags": (lambda to: d4rl(to, changed(flat(), "terminals", 1, 2)), ("column 'terminals', row 1", "0 or 1")),
    "no timeouts": (
        lambda to: d4rl(to, {name: one for name, one in flat().items() if name != "timeouts"}),
        ("column 'timeouts'", "found fields actions, metadata, observations, rewards, terminals"),
    ),
    "lengths": (
        lambda to: d4rl(to, flat() | {"rewards": np.ones(4)}),
        ("column 'rewards', row 4", "4 rows", "6, as observations has"),
    ),
    "next lengths": (lambda to: d4rl(to, flat() | {"next_observations": np.ones((5, 2))}), ("column 'next_observations', row 5",)),
    "no rows": (lambda to: d4rl(to, flat(0)), ("flat.hdf5: found no rows; expected at least one",)),
    "only cuts": (lambda to: d4rl(to, flat() | {"timeouts": np.ones(6)}), ("column 'timeouts'", "Give next_observations")),
    "choices": (
        lambda to: d4rl(to, flat() | {"actions": np.zeros(6, dtype=int)}),
        ("column 'actions'", "shape (6,)", "not choices"),
    ),
    "words": (lambda to: d4rl(to, flat() | {"rewards": np.array([b"a"] * 6)}), ("column 'rewards'", "dtype |S1")),
    "a matrix of rewards": (lambda to: d4rl(to, flat() | {"rewards": np.ones((6, 2))}), ("column 'rewards'", "shape (6, 2)")),
    "dictionaries": (
        lambda to: minari(to, episode(2) | {"observations": {"goal": np.ones((3, 2)), "seen": np.ones((3, 2))}}),
        ("column 'episode_0/observations'", "a dictionary", "Join goal, seen to one array"),
    ),
    "one observation short": (
        lambda to: minari(to, episode(2), episode(2) | {"observations": np.ones((2, 2))}),
        ("column 'episode_1/observations'", "found 2 rows; expected 3, one more than actions"),
    ),
    "minari's lengths": (
        lambda to: minari(to, episode(2) | {"rewards": np.ones(3)}),
        ("column 'episode_0/rewards'", "3 rows", "2, as actions has"),
    ),
    "minari's numbers": (
        lambda to: minari(to, episode(2), changed(episode(3), "rewards", 1, np.inf)),
        ("column 'episode_1/rewards', row 1", "found inf"),
    ),
    "minari's sizes": (
        lambda to: minari(to, episode(2), episode(2) | {"observations": np.ones((3, 5))}),
        ("column 'observations'", "the same in every"),
    ),
    "episodes of nothing": (lambda to: minari(to, episode(0)), ("found no rows",)),
    "not hdf5": (lambda to: written(to / "x.h5"), ("x.h5: found a file that cannot be read", "a complete .h5 file")),
    "not parquet": (lambda to: written(to / "x.parquet"), ("x.parquet: found a file that cannot be read",)),
    "another suffix": (
        lambda to: written(to / "x.npz"),
        ("found a file named x.npz", ".hdf5, .h5, .parquet, or a folder of Minari"),
    ),
    "no file": (lambda to: to / "none.parquet", ("none.parquet: found no such file",)),
    "an empty folder": (lambda to: to, ("found a folder; expected one of Minari, with data/main_data.hdf5",)),
    "no column": (
        lambda to: parquet(to, {name: one for name, one in columns().items() if name != "next_obs"}),
        ("column 'next_obs'",),
    ),
    "no flag": (
        lambda to: parquet(to, {name: one for name, one in columns().items() if name != "truncated"}),
        ("column 'truncated'",),
    ),
    "a short list": (
        lambda to: parquet(to, listed(columns(), "obs", 2, [1.0])),
        ("column 'obs', row 2 (counted from 0)", "found 1 numbers; expected 2"),
    ),
    "no list": (lambda to: parquet(to, listed(columns(), "next_obs", 1, None)), ("column 'next_obs', row 1", "found null")),
    "a hole": (lambda to: parquet(to, listed(columns(), "obs", 3, [0.0, None])), ("column 'obs', row 3", "found nan in entry 1")),
    "not a list": (
        lambda to: parquet(to, columns() | {"action": [0.0] * 4}),
        ("column 'action'", "type double", "lists of numbers"),
    ),
    "wide action": (
        lambda to: parquet(to, listed(columns(), "action", 3, [-1.5])),
        ("column 'action', row 3", "found -1.5", "Scale them"),
    ),
    "another next": (
        lambda to: parquet(to, columns() | {"next_obs": [[1.0]] * 4}),
        ("column 'next_obs'", "found 1 numbers a row; expected 2, as obs has"),
    ),
    "no reward": (lambda to: parquet(to, listed(columns(), "reward", 1, None)), ("column 'reward', row 1", "found nan")),
    "text": (lambda to: parquet(to, columns() | {"reward": ["a"] * 4}), ("column 'reward'", "numbers")),
    "flags": (
        lambda to: parquet(to, listed(columns(), "truncated", 2, 7)),
        ("column 'truncated', row 2", "found 7; expected 0 or 1"),
    ),
    "a missing flag": (
        lambda to: parquet(to, listed(columns(), "terminated", 0, None)),
        ("column 'terminated', row 0", "found nan"),
    ),
    "endless": (
        lambda to: parquet(to, columns() | {"logp_behavior": [-np.inf] * 4}),
        ("column 'logp_behavior', row 0", "found -inf"),
    ),
    "no parquet rows": (
        lambda to: parquet(to, {name: pl.Series(one).clear() for name, one in columns().items()}),
        ("rows.parquet: found no rows",),
    ),
}


def written(path: Path) -> Path:
    path.write_text("text")
    return path


@pytest.mark.parametrize(("make_it", "said"), CASES.values(), ids=CASES)
def test_what_cannot_be_learned_from_is_refused(make_it: Callable[[Path], Path], said: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read(make_it(tmp_path))
    for one in said:
        assert one in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_rounding_is_cut_off(tmp_path: Path) -> None:
    assert read(d4rl(tmp_path, changed(flat(), "actions", 4, 1 + 5e-7))).action.max() == 1.0


def test_reading_needs_torch_alone() -> None:
    code = "import sys, rl_core.data, rl_core.recipes; print({'h5py', 'pyarrow', 'polars', 'gymnasium'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("quality", "name", "policies"),
    [
        ("random", "pend-rand", [-1]),
        ("medium", "pend-eps60", [-3]),
        ("expert", "pend-exp10", [-2]),
        ("mix", "pend-mix10", [-2, -1]),
    ],
)
def test_pendulum_sets_are_those_of_the_suite_with_names(quality: str, name: str, policies: list[int]) -> None:
    told = list[tuple[int, int]]()
    data, made = make("pendulum", quality, 4, lambda done, total: told.append((done, total)))
    wanted = dataset(name, 4)
    assert torch.equal(data.obs, wanted.obs)
    assert torch.equal(data.action, wanted.action)
    assert data.policy is not None
    assert data.policy.unique().tolist() == policies
    assert (told[-1][0], told[-1][1]) == (told[-1][1], made["rows"] // 200)
    assert made["score"] == pytest.approx(score(made["return"]))
    assert {"random": -10, "medium": 50, "expert": 85, "mix": 0}[quality] < made["score"]
    assert made["score"] < {"random": 10, "medium": 65, "expert": 115, "mix": 20}[quality]


def test_a_replay_is_all_that_a_run_collected() -> None:
    recipe = replace(PENDULUM, steps=600, warmup=400, width=8, batch=16)
    trainer = recipe.run(Pendulum(), 0, lambda done, total: None)
    data = recipe.replay(trainer)
    assert len(data) == 600
    assert data.policy is not None
    assert data.policy[:400].eq(UNIFORM).all()
    assert data.policy[400:].tolist() == list(range(200))
    assert data.truncated.nonzero()[:, 0].tolist() == [199, 399, 599]
    assert torch.equal(data.next_obs[200:399], data.obs[201:400])
    angle, speed = torch.atan2(data.obs[:, 1], data.obs[:, 0]), data.obs[:, 2]
    assert_close(data.reward, -(angle**2 + 0.1 * speed**2 + 0.004 * data.action[:, 0] ** 2), rtol=1e-4, atol=1e-4)
    again = recipe.replay(recipe.run(Pendulum(), 0, lambda done, total: None))
    assert torch.equal(again.obs, data.obs)


def test_densities_of_noise() -> None:
    mean, action = torch.tensor([[0.0, 0.5], [0.9, 0.0]]), torch.tensor([[0.1, 0.3], [1.0, 0.0]])
    found = log_density(mean, action, 0.1)
    wanted = torch.distributions.Normal(mean[0], 0.1).log_prob(action[0]).sum()
    assert_close(found[0], wanted)
    assert found[1].isnan()  # cut at the end, where all beyond it is


def test_what_no_recipe_makes_is_refused() -> None:
    for env, quality, said in (
        ("hopper", "medium", "environment: found 'hopper'; expected pendulum or halfcheetah"),
        (
            "halfcheetah",
            "expert",
            "expert of halfcheetah: found no recipe; expected one of random, medium, replay: 100,000 steps of TD3",
        ),
        ("pendulum", "medium-expert", "medium-expert of pendulum: found no recipe"),
        ("pendulum", "best", "best of pendulum: found no recipe"),
    ):
        with pytest.raises(InputError) as error:
            make(env, quality)
        assert str(error.value).startswith(said)
    if find_spec("mujoco") is None:
        with pytest.raises(InputError, match=r"found no mujoco; expected it: pip install -e '\.\[mujoco\]'"):
            make("halfcheetah", "random")


def test_data_are_transitions() -> None:
    assert isinstance(make("pendulum", "expert")[0], Transitions)


@pytest.mark.skipif(find_spec("mujoco") is None, reason="needs MuJoCo")
def test_the_cheetah_runs_where_mujoco_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where MuJoCo writes its log
    data = uniform_rows(cheetah(), 1, np.random.default_rng(0))
    assert (len(data), data.sizes) == (1000, (17, 6))
    assert data.logp_behavior is not None
    assert_close(data.logp_behavior, torch.full((1000,), -6 * np.log(2)).float())
    assert data.truncated.nonzero()[:, 0].tolist() == [999]
