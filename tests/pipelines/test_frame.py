"""Columns to arrays: design matrices, eligible sets by label, and numbers as people read them."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from ope import DataError
from pipelines.frame import ColumnMap, design_matrix, to_log, vectors
from pipelines.tables import number

GOOD = {"action": ["b", "a", "c"], "reward": [1, 0, 1], "propensity": [0.5, 0.25, 1.0]}


def test_design_matrix_is_numbers_then_a_column_per_level() -> None:
    frame = pl.DataFrame({"x": [1, 2, 3], "device": ["phone", None, "desk"], "new": [True, False, True]})
    expected = [[1, 0, 0, 1, 0, 1], [2, 1, 0, 0, 1, 0], [3, 0, 1, 0, 0, 1]]  # x; (missing), desk, phone; false, true
    np.testing.assert_array_equal(design_matrix(frame, ["x", "device", "new"]), expected)


def test_identifiers_are_no_features() -> None:
    frame = pl.DataFrame({"id": [f"u{i}" for i in range(1001)]})
    with pytest.raises(DataError, match=r"'id': found 1,001 different texts; expected at most 1,000"):
        design_matrix(frame, ["id"])


def test_labels_keep_their_names() -> None:
    log = to_log(pl.DataFrame(GOOD), ColumnMap(), "here")
    assert log.labels == ("a", "b", "c")
    assert log.data.action.tolist() == [1, 0, 2]


def test_eligible_sets_by_label() -> None:
    frame = pl.DataFrame(GOOD | {"set": [["a", "b"], ["a"], ["c", "a"]]})
    log = to_log(frame, ColumnMap(eligible="set"), "here")
    assert log.data.eligible is not None
    assert log.data.eligible.tolist() == [[True, True, False], [True, False, False], [True, False, True]]


def test_an_eligible_label_that_no_row_took_has_no_number() -> None:
    frame = pl.DataFrame(GOOD | {"set": [["a", "b"], ["a"], ["c", "z"]]})
    with pytest.raises(DataError, match=r"here, column 'set': found action 'z', which no row took"):
        to_log(frame, ColumnMap(eligible="set"), "here")


def test_vectors_from_lists_arrays_and_text() -> None:
    expected = [[0.25, 0.75], [1.0, 0.0]]
    lists = pl.Series("v", expected)
    for column in (lists, lists.cast(pl.Array(pl.Float64, 2)), pl.Series("v", ["[0.25, 0.75]", "[1, 0]"])):
        np.testing.assert_array_equal(vectors("v", column), expected)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0042, "0.00420"), (-0.5, "-0.500"), (12.345, "12.3"), (98765.4, "98,765"), (0.0, "0"), (1e-9, "1e-09"), (2e12, "2e+12")],
)
def test_numbers_have_three_significant_digits(value: float, shown: str) -> None:
    assert number(value) == shown
