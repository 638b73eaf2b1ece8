"""An artifact loads as it was written, or not at all: mutants are refused by a named check, and this process lives on.

T22: mutants of every kind. Those of bytes fail on digests; those that whoever holds the key has signed reach a parser, which runs
in a child.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bandits.artifact import (
    FORMATS,
    MANIFEST,
    SIGNATURE,
    Limits,
    build,
    digest_of,
    load_artifact,
    parse_manifest,
    read_verified,
    write_artifact,
)
from bandits.decision_point import Actions
from bandits.events import canonical
from bandits.features import FeatureSchema, Number
from bandits.forms import write_arrays
from bandits.oracles import BoostedTrees
from bandits.policy import Floor, Softmax, Thompson
from bandits.posteriors import BetaBernoulli
from bandits.reward_models import fit_scorer
from ope.data import InputError
from tests.bandits.learner_logs import D, requests, simulated

LIMITS = Limits()
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SCHEMA = FeatureSchema(context=tuple(Number(f"x{i}") for i in range(D)))
POLICIES = {
    "linear": Floor(Softmax(fit_scorer(None, simulated(), 4)), 0.02),
    "trees": Floor(Softmax(fit_scorer(BoostedTrees(trees=5), simulated(), 4)), 0.02),
    "belief": Floor(Thompson(BetaBernoulli.prior(4).update([0, 1, 1], [1.0, 0.0, 1.0]), 200), 0.02),
}


def write(folder: Path, policy: str = "linear", **more) -> Path:
    settings = {"name": "night", "decision_point": "route", "features": SCHEMA, "actions": Actions(catalogue=tuple("abcd"))}
    return folder / write_artifact(folder, POLICIES[policy], KEY, golden=requests(40), **(settings | more))


def load(path: Path, digest: str | None = None, limits: Limits = LIMITS):
    return load_artifact(path, KEY.public_key(), digest or path.name, limits)


def signed(path: Path, **changed: bytes) -> Path:
    """The artifact with other files, signed by the right key: only a parser can object."""
    files = {name: (path / name).read_bytes() for name in FORMATS} | {
        name.replace("_", "."): content for name, content in changed.items()
    }
    document = msgspec.json.decode((path / MANIFEST).read_bytes())
    for name, content in files.items():
        document["files"][name] = {"format": FORMATS[name], "size": len(content), "blake2b": digest_of(content)}
    raw = canonical(document)
    other = path.parent / digest_of(raw)
    shutil.rmtree(other, ignore_errors=True)
    other.mkdir()
    for name, content in (files | {MANIFEST: raw, SIGNATURE: KEY.sign(raw)}).items():
        (other / name).write_bytes(content)
    return other


@pytest.mark.parametrize("policy", POLICIES)
def test_loads_as_it_was_written(tmp_path, policy):
    path = write(tmp_path, policy, snapshot={"date": "2026-01-01"}, metrics={"DR": 0.4})
    artifact = load(path)
    assert np.array_equal(artifact.policy.propensities(requests()), POLICIES[policy].propensities(requests()))
    assert artifact.reference == f"night@{path.name[:32]}"
    assert (artifact.manifest.snapshot, artifact.manifest.metrics) == ({"date": "2026-01-01"}, {"DR": 0.4})
    assert artifact.manifest.features == SCHEMA
    assert sorted(each.name for each in path.iterdir()) == sorted([MANIFEST, SIGNATURE, *FORMATS])


def test_equal_content_has_one_digest_and_other_content_another(tmp_path):
    first = write(tmp_path)
    assert write(tmp_path) == first == write(tmp_path / "elsewhere").parent.parent / first.name
    others = {write(tmp_path, "belief"), write(tmp_path, name="other"), write(tmp_path, parent=first.name)}
    assert len(others | {first}) == 4


def mutant(contents: dict[str, bytes], number: int, rng: np.random.Generator) -> dict[str, bytes]:
    """One of an artifact's files: with a bit flipped, cut, longer, or with what another one holds."""
    names = sorted(contents)
    name, kind = names[number % len(names)], number // len(names) % 4
    content = bytearray(contents[name])
    place = int(rng.integers(len(content)))
    if kind == 0:
        content[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del content[place:]
    elif kind == 2:
        content[place:place] = rng.bytes(1 + number % 40)
    else:
        content = bytearray(contents[names[(names.index(name) + 1 + number // 20 % 4) % len(names)]])
    return {name: bytes(content)}


def put(path: Path, contents: dict[str, bytes]) -> None:
    """A folder with these files and nothing else."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for name, content in contents.items():
        (path / name).write_bytes(content)


def test_thousand_mutants_of_bytes_are_refused(tmp_path):
    """Flips, cuts, additions and swaps in any file; none gets past digests and signature, so none is parsed."""
    original, rng, seen = write(tmp_path / "good"), np.random.default_rng(22), Counter[str]()
    contents = {name: (original / name).read_bytes() for name in (MANIFEST, SIGNATURE, *FORMATS)}
    path = tmp_path / "mutant" / original.name
    for number in range(1000):
        put(path, contents | mutant(contents, number, rng))
        with pytest.raises(InputError, match=r"(digest|signature) check") as refusal:
            load(path)
        seen[str(refusal.value).split(" check")[0].rsplit(" ", 1)[-1]] += 1
    assert seen == {"digest": 800, "signature": 200}  # one file of five is the signature


def link(path: Path, name: str) -> None:
    (path / name).rename(path.parent / "elsewhere")
    (path / name).symlink_to(path.parent / "elsewhere")


def hard_link(path: Path, name: str) -> None:
    os.link(path / name, path.parent / "second-name")


def pipe(path: Path, name: str) -> None:
    (path / name).unlink()
    os.mkfifo(path / name)


TRICKS = {
    "a link": (lambda path: link(path, "policy.json"), "folder check"),
    "a hard link": (lambda path: hard_link(path, "policy.json"), "folder check"),
    "a pipe": (lambda path: pipe(path, "arrays.npz"), "folder check"),
    "a folder": (lambda path: ((path / "arrays.npz").unlink(), (path / "arrays.npz").mkdir()), "folder check"),
    "one more": (lambda path: (path / "code.py").write_text("1"), "folder check: found or missed 'code.py'"),
    "one less": (lambda path: (path / SIGNATURE).unlink(), "found or missed 'manifest.sig'"),
    "nothing": (shutil.rmtree, "folder check"),
}


@pytest.mark.parametrize(("trick", "said"), TRICKS.values(), ids=TRICKS)
def test_tricks_with_paths_are_refused(tmp_path, trick, said):
    path = write(tmp_path)
    trick(path)
    with pytest.raises(InputError, match=said):
        load(path)


def test_a_folder_that_is_a_link_a_digest_of_another_and_another_key_are_refused(tmp_path):
    path, other = write(tmp_path), write(tmp_path, "belief")
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(InputError, match="no plain folder"):
        load(tmp_path / "link", path.name)
    with pytest.raises(InputError, match="digest check"):
        load(path, other.name)
    with pytest.raises(InputError, match="signature check"):
        load_artifact(path, Ed25519PrivateKey.generate().public_key(), path.name)
    with pytest.raises(InputError, match=r"size check: found .* expected at most 100"):
        load(path, limits=Limits(file_bytes=100))


def npz(compression: int, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name + ".npy", content)
    return buffer.getvalue()


def npy(array: np.ndarray, **more) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **more)
    return buffer.getvalue()


class Bomb:
    """What a pickle could do: leave a file behind."""

    def __reduce__(self):
        return (Path.touch, (Path("/tmp/propel-pickle-ran"),))


def huge() -> bytes:
    """A gigabyte of zeros in a megabyte."""
    head = npy(np.empty(0))[:128].replace(b"(0,), }                      ", b"(134217728,), }              ")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file, file.open("policy.bias.npy", "w", force_zip64=True) as member:
        member.write(head)
        for _ in range(64):
            member.write(bytes(2**24))
    return buffer.getvalue()


def tree_text(path: Path) -> dict:
    return msgspec.json.decode((path / "policy.json").read_bytes())


def broken_trees(path: Path, change) -> bytes:
    document = tree_text(path)
    document["policy"]["scorer"]["model"] = change(document["policy"]["scorer"]["model"])
    return canonical(document)


SIGNED = {
    "a pickle": lambda path: {"arrays_npz": npz(zipfile.ZIP_STORED, x=npy(np.array([Bomb()]), allow_pickle=True))},
    "a pickle alone": lambda path: {"arrays_npz": pickle.dumps(Bomb())},
    "a gigabyte": lambda path: {"arrays_npz": huge()},
    "compressed": lambda path: {"arrays_npz": npz(zipfile.ZIP_DEFLATED, x=npy(np.zeros(9)))},
    "no arrays": lambda path: {"arrays_npz": b""},
    "texts": lambda path: {"arrays_npz": npz(zipfile.ZIP_STORED, x=npy(np.array(["a"])))},
    "a shape beyond its bytes": lambda path: {
        "golden_npz": npz(zipfile.ZIP_STORED, context=npy(np.empty(0))[:128].replace(b"(0,), }     ", b"(99999999,),}"[:12]))
    },
    "a path": lambda path: {"arrays_npz": npz(zipfile.ZIP_STORED, **{"../../etc/x": npy(np.zeros(3))})},
    "no JSON": lambda path: {"policy_json": b"{"},
    "an unknown kind": lambda path: {"policy_json": b'{"kind":"shell"}'},
    "deep nesting": lambda path: {"policy_json": b'{"kind":"floor","policy":' * 5000 + b"1" + b"}" * 5000},
    "other answers": lambda path: {"policy_json": b'{"kind":"uniform"}'},
    "trees cut short": lambda path: {"policy_json": broken_trees(path, lambda text: text[: len(text) // 2])},
    "trees of noise": lambda path: {
        "policy_json": broken_trees(path, lambda text: text.replace("split_feature=", "split_feature=9"))
    },
    "no trees": lambda path: {"policy_json": broken_trees(path, lambda _: "tree\nversion=v4\n")},
    "children in a circle": lambda path: {
        "policy_json": broken_trees(path, lambda text: text.replace("left_child=1", "left_child=0"))
    },
    "golden of another shape": lambda path: {"golden_npz": write_arrays({"context": np.zeros((2, D))})},
}


@pytest.mark.parametrize("name", SIGNED)
def test_what_the_key_has_signed_is_still_tried_in_a_child(tmp_path, name):
    """The loader refuses, whatever the parser does; this process neither dies nor runs anything from the file."""
    path = signed(write(tmp_path, "trees"), **SIGNED[name](write(tmp_path, "trees")))
    read_verified(path, KEY.public_key(), path.name)
    with pytest.raises(InputError, match="trial check"):
        load(path, limits=Limits(seconds=5 if name == "children in a circle" else 20))  # that one answers nothing, ever
    assert not Path("/tmp/propel-pickle-ran").exists()


def test_manifests_of_another_format_are_refused(tmp_path):
    document = msgspec.json.decode((write(tmp_path) / MANIFEST).read_bytes())
    for change, said in (
        ({"format": 2}, "found format 2; expected 1"),
        ({"code": "x"}, "unknown field"),
        ({"files": 3}, "manifest check"),
    ):
        with pytest.raises(InputError, match=said):
            parse_manifest(canonical(document | change), "it")


def test_a_policy_without_a_form_leaves_nothing_behind(tmp_path):
    with pytest.raises(InputError, match="found a object; expected numbers"):
        write_artifact(
            tmp_path, Softmax(object()), KEY, name="x", decision_point="route", features=SCHEMA,
            actions=Actions(catalogue=("a",)), golden=requests(3),
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_time_of_the_trial_is_bounded(tmp_path):
    path = write(tmp_path)
    with pytest.raises(InputError, match="trial check: found no answer in 0 s"):
        load(path, limits=Limits(seconds=0))
    assert build(read_verified(path, KEY.public_key(), path.name)) is not None
