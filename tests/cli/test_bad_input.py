"""Bad input: exit code 2, nothing on standard output, and a message with file, column, first row, what is expected, what to do."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.cli.conftest import Run

ELIGIBLE = ("--eligible", "eligible")
CASES = [
    ("propensity 0", {"propensity": {7: 0.0}}, "uniform", (), ["'propensity'", "row 7", "found 0.0", "(0, 1]", "never fill in 1"]),
    ("propensity negative", {"propensity": {3: -0.1}}, "uniform", (), ["'propensity'", "row 3", "found -0.1", "(0, 1]"]),
    ("propensity above 1", {"propensity": {9: 1.5}}, "uniform", (), ["'propensity'", "row 9", "found 1.5", "(0, 1]"]),
    ("propensity NaN", {"propensity": {4: math.nan}}, "uniform", (), ["'propensity'", "row 4", "found nan", "never fill in 1"]),
    (
        "propensity missing",
        {"propensity": {5: None}},
        "uniform",
        (),
        ["'propensity'", "row 5", "a missing value", "never fill in 1"],
    ),
    ("no propensity column", {"propensity": None}, "uniform", (), ["'propensity'", "no such column", "one of action, reward"]),
    ("propensity as text", {"propensity": ["high"] * 500}, "uniform", (), ["'propensity'", "row 0", "'high'", "a number"]),
    ("reward NaN", {"reward": {11: math.nan}}, "uniform", (), ["'reward'", "row 11", "found nan", "finite", "unknown is not 0"]),
    ("reward infinite", {"reward": {12: math.inf}}, "uniform", (), ["'reward'", "row 12", "found inf", "finite"]),
    ("reward missing", {"reward": {13: None}}, "uniform", (), ["'reward'", "row 13", "a missing value", "unknown is not 0"]),
    ("action negative", {"action": {2: -1}}, "uniform", (), ["'action'", "row 2", "found -1", "at least 0"]),
    ("action a fraction", {"action": [0.5] * 500}, "uniform", (), ["'action'", "row 0", "0.5", "index or label"]),
    ("action too high", {"action": {6: 3}}, "policy", (), ["'action'", "row 6", "action 3", "below k = 3"]),
    ("target sum", {"policy": {8: [0.5, 0.5, 0.5]}}, "policy", (), ["'policy'", "row 8", "sums to 1.5", "sum to 1", "Normalise"]),
    ("target negative", {"policy": {8: [-0.5, 0.5, 1.0]}}, "policy", (), ["'policy'", "row 8", "-0.5 for action 0", "at least 0"]),
    ("target ragged", {"policy": {8: [0.5, 0.5]}}, "policy", (), ["'policy'", "row 8", "2 entries", "3 in every row"]),
    ("target missing", {"policy": {8: None}}, "policy", (), ["'policy'", "row 8", "a missing value"]),
    ("scalar above 1", {"scalar": {8: 1.2}}, "scalar", (), ["'scalar'", "row 8", "1.2", "[0, 1]"]),
    ("outside the set", {"action": {0: 2}, "eligible": {0: [0, 1]}}, "uniform", ELIGIBLE, ["'action'", "row 0", "eligible set"]),
    (
        "on ineligible",
        {"action": {1: 0}, "eligible": {1: [0, 1]}},
        "policy",
        ELIGIBLE,
        ["'policy'", "row 1", "ineligible action 2"],
    ),
    ("context NaN", {"x": {14: math.nan}}, "policy", ("--context", "x"), ["'x'", "row 14 (counted from 0)", "finite"]),
    (
        "a text among numbers",
        {"x": ["0.5"] * 20 + ["n/a"] + ["1.5"] * 479},
        "policy",
        ("--context", "x"),
        ["'x'", "row 20", "'n/a'"],
    ),
    ("context of lists", {}, "policy", ("--context", "eligible"), ["'eligible'", "List", "one number or text per row"]),
    ("action of lists", {}, "uniform", ("--action", "policy"), ["'policy'", "one number or text per row"]),
    ("cluster of lists", {}, "uniform", ("--cluster", "policy"), ["'policy'", "one number or text per row"]),
    ("reward of lists", {}, "uniform", ("--reward", "policy"), ["'policy'", "one number or text per row"]),
    ("policy of texts", {"policy": [["a", "b"]] * 500}, "policy", (), ["'policy'", "row 0", "a list of numbers"]),
    ("null in a vector", {"policy": {8: [0.5, None, 0.5]}}, "policy", (), ["'policy'", "row 8", "Fill every entry"]),
    ("null in a set", {"eligible": {8: [0, None, 1]}}, "uniform", ELIGIBLE, ["'eligible'", "row 8", "a missing action"]),
    ("action an identifier", {"action": {3: 10**12}}, "uniform", (), ["'action'", "row 3", "1000000000000", "below 1,000,000"]),
    ("too few actions", {}, "uniform", ("--actions", "2"), ["'action'", "below --actions 2", "Raise --actions"]),
    ("reward of 1e200", {"reward": {3: 1e200}}, "uniform", (), ["'reward'", "row 3", "1e+200"]),
    ("labels without order", {"action": ["a", "b", "c"] * 166 + ["a", "b"]}, "policy", (), ["'policy'", "--labels a,b,c"]),
    (
        "label unknown",
        {"action": ["z"] * 500},
        "uniform",
        ("--labels", "a,b"),
        ["'action'", "row 0", "'z'", "one of the labels a, b"],
    ),
    (
        "labels too few",
        {"action": ["a"] * 500},
        "policy",
        ("--labels", "a,b"),
        ["'policy'", "vectors of 3", "2 entries, one per label"],
    ),
    ("context unknown", {}, "policy", ("--context", "xx"), ["'xx'", "no such column", "Did you mean 'x'?"]),
    ("column unknown", {}, "uniform", ("--reward", "rewards"), ["'rewards'", "no such column", "Did you mean 'reward'?"]),
    ("policy unknown", {}, "polcy", (), ["policy 'polcy'", "neither a file nor a column", "Did you mean 'policy'?"]),
    ("uniform misspelt", {}, "Uniform", (), ["policy 'Uniform'", "Did you mean 'uniform'?"]),
    ("empty", {"action": [], "reward": [], "propensity": []}, "uniform", (), ["an empty log", "at least one row"]),
]


@pytest.mark.parametrize(("changes", "policy", "options", "said"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_message_says_where_and_what(write_log: Any, run: Run, changes: Any, policy: str, options: Any, said: list[str]) -> None:
    if changes.get("action") == []:
        changes = dict.fromkeys(("x", "policy", "scalar", "eligible", "user")) | changes
    log = write_log(**changes)
    result = run(log, *options, policy=policy)
    assert result.exit_code == 2
    assert result.stdout == ""
    for part in [str(log), *said]:
        assert part in result.stderr


def test_truncated_parquet_is_an_error_at_every_length(write_log: Any, run: Run, tmp_path: Path) -> None:
    whole = write_log().read_bytes()
    for kept in (0, 4, len(whole) // 2, len(whole) - 1):
        cut = tmp_path / "cut.parquet"
        cut.write_bytes(whole[:kept])
        result = run(cut)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"{cut}: found a file that cannot be read" in result.stderr
        assert "expected a complete .parquet file. Write or copy it again." in result.stderr


def test_corrupt_page_in_the_middle_is_an_error(write_log: Any, run: Run) -> None:
    log = write_log()
    spoiled = bytearray(log.read_bytes())
    spoiled[200:600] = bytes(400)
    log.write_bytes(bytes(spoiled))
    result = run(log)
    assert result.exit_code == 2
    assert str(log) in result.stderr


@pytest.mark.parametrize(("name", "said"), [("log.txt", "ends in .parquet or .csv"), ("absent.parquet", "no such file")])
def test_files_that_are_no_logs(run: Run, tmp_path: Path, name: str, said: str) -> None:
    path = tmp_path / name
    if path.suffix == ".txt":
        path.write_text("action\n1\n")
    result = run(path)
    assert result.exit_code == 2
    assert str(path) in result.stderr
    assert said in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--estimators", "DR"), "DR needs a reward model"),
        (("--estimators", "Delta"), "--baseline"),
        (("--seed", "-1"), "greater than or equal to 0"),
        (("--actions", "-1"), "greater than or equal to 1"),
        (("--estimators", "SNIP"), "did you mean 'SNIPS'?"),
        (("--estimators", "cIPS(-1)"), "at least 0"),
        (("--estimators", "IPS(3)"), "no setting"),
        (("--level", "95"), "a coverage between 0 and 1"),
        (("--interval", "bernstein"), "--weight-bound"),
        (("--interval", "bernstein", "--weight-bound", "0.5", "--reward-range", "0,1"), "Raise weight_bound"),
        (("--interval", "bernstein", "--weight-bound", "99", "--reward-range", "0,0.5"), "Widen reward_range"),
        (("--interval", "bernstein", "--weight-bound", "99", "--reward-range", "0,1", "--estimators", "SNIPS"), "bounded column"),
        (("--interval", "bernstein", "--weight-bound", "99", "--reward-range", "1"), "two numbers"),
        (("--interval", "bootstrap", "--resamples", "10"), "at least 1000"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_met(write_log: Any, run: Run, options: tuple[str, ...], said: str) -> None:
    result = run(write_log(), *options, policy="policy")
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())


def test_a_scalar_target_names_the_estimators_that_need_the_vector(write_log: Any, run: Run) -> None:
    result = run(write_log(), "--context", "x", "--estimators", "DR", policy="scalar")
    assert result.exit_code == 2
    assert "all k of them, which DR needs" in result.stderr
    assert "'scalar'" in result.stderr


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ({"row": [0, 1], "p_0": [0.5, 0.5], "p_1": [0.5, 0.5]}, "each of 0..499 once"),
        ({"row": [*range(499), 7], "p_0": [1.0] * 500}, "each of 0..499 once"),
        ({"row": [*range(500)], "p_0": [0.5] * 500, "p_2": [0.5] * 500}, "none left out"),
        ({"rows": [*range(500)], "p_0": [1.0] * 500}, "Did you mean 'rows'?"),
        ({"row": [*range(500)], "p_0": [0.4] * 500, "p_1": [0.3] * 500, "p_2": [0.2] * 500}, "sums to 0.9"),
    ],
)
def test_policy_files(write_log: Any, run: Run, tmp_path: Path, frame: dict[str, Any], said: str) -> None:
    path = tmp_path / "policy.parquet"
    pl.DataFrame(frame).write_parquet(path)
    result = run(write_log(), policy=str(path))
    assert result.exit_code == 2
    assert str(path) in result.stderr
    assert said in result.stderr


def test_two_rows_are_too_few_for_a_reward_model(write_log: Any, run: Run, columns: dict[str, Any]) -> None:
    two = {name: values[:2] for name, values in columns.items()}
    result = run(write_log(**two), "--context", "x", policy="policy")
    assert result.exit_code == 2
    assert "found 2 rows; expected at least 3" in result.stderr


def test_a_file_separated_by_semicolons_gets_a_hint(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("action;reward;propensity\n0;1;0.5\n")
    result = run(path)
    assert result.exit_code == 2
    assert "separated by something else than commas" in result.stderr


def test_no_spoiled_column_ends_in_a_traceback(write_log: Any, run: Run) -> None:
    """Whatever a column holds, the answer is a table or a message."""
    odd: list[Any] = [
        None, "", "x", -1, 0, 1, 2**62, 1e308, -1e308, math.nan, math.inf, True, [], [1.0], [None], ["a"], {"a": 1}, "[", "[1,2,3]",
    ]  # fmt: skip
    options = ("--eligible", "eligible", "--cluster", "user", "--context", "x", "--baseline", "scalar")
    for column in ("action", "reward", "propensity", "x", "policy", "scalar", "eligible", "user"):
        for value in odd:
            result = run(write_log(**{column: [value] * 500}), *options, policy="policy")
            assert result.exit_code in (0, 2, 3), (column, value, result.exception)


def test_a_report_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    """The largest file that this process may write is smaller than the page: a full disk, as the program sees it."""
    out = tmp_path / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))"
    code = f"{limit}; import sys; sys.argv = ['propel', 'demo', '--out', {str(out)!r}]; import propel; propel.main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert f"{out / 'report.html'}: File too large" in result.stderr
    assert not [path for path in out.iterdir() if path.name.endswith(".part") or path.name == "report.html"]
