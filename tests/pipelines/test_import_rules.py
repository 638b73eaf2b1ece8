"""What every import keeps to: shares next to their probabilities, units, and what is proposed or said at the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.exporters import read_decisions, to_dsjson
from pipelines.importers.events import Naming
from pipelines.importers.exposures import Exposures
from pipelines.importers.files import remarks
from pipelines.importers.layout import nearest_shares
from pipelines.imports import import_log
from tests.pipelines.dsjson_lines import import_lines, single


def test_the_version_may_be_a_number(tmp_path: Path) -> None:
    assert len(import_lines(tmp_path, [single("e1", Version=1)]).decisions) == 1


def test_deferred_actions_are_imported_and_counted(tmp_path: Path) -> None:
    """Without `_skipLearn` nothing says that the action was not taken: what VW would learn from is learned from, and said."""
    found = import_lines(tmp_path, [single("e1", DeferredAction=True), single("e2", DeferredAction=True, _skipLearn=True)])
    assert [decision.kind for decision in found.decisions] == ["sampled", "shadow"]
    assert found.report.notes == ["1 decisions say DeferredAction without _skipLearn: imported as sampled."]


@pytest.mark.parametrize("k", [2, 3, 7, 50, 200])
def test_no_share_is_a_whole_share_away_from_its_probability(k: int) -> None:
    rng = np.random.default_rng(k)
    vectors = rng.dirichlet(np.full(k, 0.3), 2000)
    vectors[:100, 0] = 0.0
    vectors /= vectors.sum(axis=1, keepdims=True)
    shares = nearest_shares(vectors)
    assert (shares.sum(axis=1) == 2**31).all()
    assert (shares[vectors == 0] == 0).all()
    assert np.abs(shares / 2**31 - vectors).max() < 2.0**-31


def test_a_decision_without_its_unit_stands_for_itself_and_the_others_stay_clustered(tmp_path: Path) -> None:
    lines = [single(f"e{i}", c=single()["c"] | {"User": {} if i == 3 else {"id": f"u{i % 2}"}}) for i in range(8)]
    found = import_lines(tmp_path, lines, Naming(unit="User.id"))
    assert [decision.unit for decision in found.decisions] == ["u0", "u1", "u0", "e3", "u0", "u1", "u0", "u1"]
    assert "1 of 8 decisions lack units" in found.report.missing["units"]
    assert remarks(found.folder / "log.parquet")["cluster"] == "unit"


def test_columns_that_evaluation_would_refuse_are_not_proposed(tmp_path: Path) -> None:
    """`age` is missing once, `id` is the unit, `nope` is a typo."""
    contexts = [{"User": {"id": "u", "tier": "gold"} | ({} if i == 3 else {"age": i})} for i in range(5)]
    lines = [single(f"e{i}", c={"_multi": single()["c"]["_multi"]} | context) for i, context in enumerate(contexts)]
    found = import_lines(tmp_path, lines, Naming(unit="User.id"))
    assert found.report.context == ["User.id", "User.tier", "User.age"]
    assert found.report.usable == ["User.tier"]
    (tmp_path / "typo").mkdir()
    typo = import_lines(tmp_path / "typo", lines, Naming(unit="User.nope", context=("User.tier", "User.nope")))
    assert typo.report.usable == ["User.tier"]
    assert "No decision has User.nope: check the names in --context." in typo.report.notes
    assert "No decision has the unit User.nope: check the name in --unit." in typo.report.notes


def test_a_unit_that_is_not_in_the_context_survives_the_way_there_and_back(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("action,ok,user\na,1,u1\nb,0,u2\na,0,u1\n")
    import_log(
        table, tmp_path / "events", Naming(), exposures=lambda: Exposures(reward="ok", split={"a": 0.5, "b": 0.5}, unit="user")
    )
    to_dsjson(tmp_path / "events", tmp_path / "back.dsjson")
    import_log(tmp_path / "back.dsjson", tmp_path / "again", Naming())
    first, second = (list(read_decisions(tmp_path / name)) for name in ("events", "again"))
    assert [decision.unit for decision in second] == ["u1", "u2", "u1"]
    assert [bytes(decision.body) for decision in second] == [bytes(decision.body) for decision in first]
