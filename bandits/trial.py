"""What an artifact goes through before it serves: its policy is built, and answers the golden requests as it did when written.

The child that tries it first imports this and no more: every process of a service starts one for every policy that is promoted.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from bandits.batch import DecisionBatch
from bandits.forms import Form, from_form, read_arrays, to_form
from bandits.policy import Policy
from ope.data import InputError

AGREE = 1e-9
"""How far golden propensities may differ: processors add in different orders."""


def build(files: Mapping[str, bytes]) -> Policy:
    """The policy in verified bytes. Raises InputError where it cannot be built or does not answer as it did when written."""
    golden = read_arrays(files["golden.npz"])
    try:
        document = msgspec.json.decode(files["policy.json"], type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError) as error:
        raise InputError(f"policy.json: {error}") from None
    arrays = read_arrays(files["arrays.npz"])
    policy = from_form(Form(document, arrays))
    if arrays.keys() != to_form(policy).arrays.keys():
        raise InputError(f"arrays.npz: found arrays {sorted(arrays)[:5]}; expected those of policy.json and no others")
    expected = {"context", "action_features", "eligible", "propensities"}
    if set(golden) != expected:
        raise InputError(f"golden.npz: found {sorted(golden)}; expected {sorted(expected)}")
    batch = DecisionBatch.of(golden["context"], golden["eligible"], golden["action_features"])
    answers = policy.propensities(batch)
    if answers.shape != golden["propensities"].shape:
        raise InputError(f"golden check: found answers {answers.shape}; expected {golden['propensities'].shape}")
    worst = float(np.abs(answers - golden["propensities"]).max())
    if not worst <= AGREE:
        raise InputError(
            f"golden check: found propensities that differ by {worst:.3g} from the recorded; expected at most {AGREE:g}"
        )
    return policy


def trial() -> int:
    """What the child does: limits first, then the golden requests."""
    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        build(msgspec.msgpack.decode(sys.stdin.buffer.read(), type=dict[str, bytes]))
    except Exception as error:  # whatever a parser raises is a refusal, said in one line
        sys.stderr.write(f"{type(error).__name__}: {error}".replace("\n", " "))
        return 2
    return 0
