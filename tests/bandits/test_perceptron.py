"""The perceptron as a scorer: values by hand, the same bits in any company, forms to the byte, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bandits.artifact import load_artifact, write_artifact
from bandits.batch import DecisionBatch
from bandits.decision_point import Actions
from bandits.features import FeatureSchema, Number
from bandits.forms import Form, from_bytes, from_form, to_bytes, to_form
from bandits.policy import Floor, Greedy, Softmax
from bandits.scorers import Linear, Perceptron
from ope.data import InputError

N, D, K = 1000, 3, 4


def perceptron(*sizes: int, seed: int = 0, activation: Literal["relu", "tanh"] = "tanh") -> Perceptron:
    rng = np.random.default_rng(seed)
    shapes = list(pairwise(sizes))
    weights = tuple(rng.normal(size=shape) / np.sqrt(shape[0]) for shape in shapes)
    return Perceptron(weights, tuple(rng.normal(size=shape[1]) for shape in shapes), activation)


def requests(context: Any, k: int = K, p: int = 0) -> DecisionBatch:
    context = np.asarray(context, dtype=float)
    return DecisionBatch.of(context, np.ones((len(context), k), dtype=bool), np.zeros((len(context), k, p)))


CONTEXT = np.random.default_rng(5).normal(size=(N, D))
ALL = {
    "tanh": perceptron(D, 16, 9, K),
    "relu": perceptron(D, 16, 9, K, activation="relu"),
    "wide": perceptron(D, 130, K, seed=1),
    "straight": perceptron(D, K, seed=2),
}
each = pytest.mark.parametrize("scorer", ALL.values(), ids=ALL)

FIRST, SECOND = np.array([[1.0, -2.0], [0.5, 1.0]]), np.array([[1.0, 0.0, 2.0], [-1.0, 3.0, 0.5]])
BIASES = np.array([0.25, -0.5]), np.array([0.0, 1.0, -1.0])


@pytest.mark.parametrize(
    ("activation", "hidden"),
    # (2, -1): 2·1 - 1·0.5 + 0.25 = 1.75, 2·-2 - 1·1 - 0.5 = -5.5; (-1, 4): 1.25, 5.5
    [("relu", [[1.75, 0.0], [1.25, 5.5]]), ("tanh", np.tanh([[1.75, -5.5], [1.25, 5.5]]).tolist())],
)
def test_values_by_hand(activation: Literal["relu", "tanh"], hidden: list[list[float]]) -> None:
    found = Perceptron((FIRST, SECOND), BIASES, activation).scores(requests([[2.0, -1.0], [-1.0, 4.0]], 3))
    expected = [[a - b, 3 * b + 1, 2 * a + 0.5 * b - 1] for a, b in hidden]
    assert found == pytest.approx(np.array(expected), rel=0, abs=1e-15)


def test_without_hidden_layers_it_is_linear_to_the_bit() -> None:
    scorer = ALL["straight"]
    linear = Linear(scorer.biases[0], scorer.weights[0], np.empty(0))
    assert scorer.scores(requests(CONTEXT)).tobytes() == linear.scores(requests(CONTEXT)).tobytes()


@each
def test_a_row_has_the_same_bits_alone_and_in_any_batch(scorer: Perceptron) -> None:
    batch, whole = requests(CONTEXT), scorer.scores(requests(CONTEXT))
    assert whole.shape == (N, K)
    for size in (1, 2, 3, 5, 8, 13, 64, 999):
        parts = [scorer.scores(batch.rows(slice(start, start + size))) for start in range(0, N, size)]
        assert np.concatenate(parts).tobytes() == whole.tobytes(), f"{size} at a time"
    order = np.random.default_rng(1).permutation(N)
    assert scorer.scores(requests(CONTEXT[order])).tobytes() == whole[order].tobytes()
    for context in (np.asfortranarray(CONTEXT), np.repeat(CONTEXT, 2, axis=1)[:, ::2]):
        assert scorer.scores(requests(context)).tobytes() == whole.tobytes(), "whatever the strides"


@each
def test_a_call_changes_nothing(scorer: Perceptron) -> None:
    batch = requests(CONTEXT.copy())
    assert scorer.scores(batch).tobytes() == scorer.scores(batch).tobytes()
    assert (batch.context == CONTEXT).all()


def test_layers_are_copies_that_nobody_writes_to() -> None:
    own = FIRST.copy()
    scorer = Perceptron((own, SECOND), BIASES)
    own[:] = 0
    assert (scorer.weights[0] == FIRST).all()
    with pytest.raises(ValueError, match="read-only"):
        scorer.weights[1][0, 0] = 1.0
    with pytest.raises(ValueError, match="read-only"):
        scorer.biases[0][0] = 1.0
    with pytest.raises(FrozenInstanceError):
        scorer.activation = "relu"  # type: ignore[misc]


@each
def test_forms_survive_to_the_byte_and_score_alike(scorer: Perceptron) -> None:
    policy = Floor(Softmax(scorer, 0.5), 0.1)
    document, arrays = to_bytes(to_form(policy))
    rebuilt = from_form(from_bytes(document, arrays))
    assert to_bytes(to_form(rebuilt)) == (document, arrays)
    assert rebuilt.propensities(requests(CONTEXT)).tobytes() == policy.propensities(requests(CONTEXT)).tobytes()
    transposed = replace(scorer, weights=tuple(np.ascontiguousarray(weight) for weight in scorer.weights))
    assert to_bytes(to_form(Floor(Softmax(transposed, 0.5), 0.1))) == (document, arrays), "equal policies, equal bytes"


def test_ineligible_actions_have_no_share() -> None:
    eligible = np.ones((N, K), dtype=bool)
    eligible[:, 1] = False
    found = Softmax(ALL["tanh"]).propensities(DecisionBatch.of(CONTEXT, eligible))
    assert (found[:, 1] == 0).all()
    assert found.sum(axis=1) == pytest.approx(1.0)


def test_an_artifact_of_it_passes_its_trial(tmp_path: Any) -> None:
    key = Ed25519PrivateKey.generate()
    policy = Floor(Greedy(ALL["relu"]), 0.1)
    features = FeatureSchema(context=tuple(Number(f"x{at}") for at in range(D)))
    digest = write_artifact(
        tmp_path, policy, key, name="bent", decision_point="route", features=features, actions=Actions(catalogue=tuple("abcd")),
        golden=requests(CONTEXT[:20]),
    )  # fmt: skip
    loaded = load_artifact(tmp_path / digest, key.public_key(), digest).policy
    assert loaded.propensities(requests(CONTEXT)).tobytes() == policy.propensities(requests(CONTEXT)).tobytes()


def test_it_loads_numpy_alone() -> None:
    code = "import sys; from bandits.scorers import Perceptron; print(sorted({'torch', 'scipy', 'msgspec'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    "batch",
    [requests(CONTEXT[:, :2]), requests(CONTEXT, K + 1), requests(CONTEXT, 1), requests(CONTEXT, K, p=2)],
    ids=["fewer features", "more actions", "one action", "action features"],
)
def test_other_features_or_actions_are_refused(batch: DecisionBatch) -> None:
    with pytest.raises(InputError, match=r"expected 3, 4 and 0: score with the schema"):
        ALL["tanh"].scores(batch)


@pytest.mark.parametrize(
    ("weights", "biases"),
    [
        ((), ()),
        ((FIRST,), ()),
        ((FIRST, SECOND), BIASES[:1]),
        ((FIRST, SECOND.T), BIASES),
        ((FIRST,), (np.zeros(3),)),
        ((FIRST[0],), (np.zeros(2),)),
        ((np.empty((2, 0)), np.empty((0, 3))), (np.empty(0), np.zeros(3))),
    ],
)
def test_layers_that_do_not_fit_are_refused(weights: Any, biases: Any) -> None:
    with pytest.raises(InputError, match="expected as many of both"):
        Perceptron(weights, biases)


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(InputError, match="expected 'relu' or 'tanh'"):
        Perceptron((FIRST,), BIASES[:1], "gelu")  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", [("weights", 3), ("weights", [["a"], ["b"]]), ("biases", None), ("activation", "exec")])
def test_forms_that_hold_something_else_are_refused(setting: tuple[str, Any]) -> None:
    document, arrays = to_form(Softmax(ALL["tanh"]))
    document["scorer"] |= dict([setting])
    with pytest.raises(InputError, match="policy"):
        from_form(Form(document, arrays))
