"""A policy and its report as a folder that MLflow loads as a `python_function` model. MLflow itself is not needed to write it."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from bandits.artifact import Artifact, load_artifact
from bandits.registry import Registry
from ope.data import InputError

NOT_IN_NAMES = re.compile(r"[^\w. /-]+")
"""What MLflow does not take in the name of a metric."""

TRUST = "trust.json"
"""Digest of the artifact, and the public key that it was signed for."""


KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
"""What JSON calls the values that Python reads from it."""

METRICS = ("value", "stderr", "low", "high", "ess")
"""Numbers of a record that become metrics; None where they were withheld."""


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """What MLflow calls: requests in, probabilities out."""

    artifact: Artifact

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[Any]:
        """Probabilities of every request: {action: probability} for a catalogue, else a list in the order of its actions.

        `model_input`: a data frame, or a list of dictionaries, with `context` and, where actions come with requests, `actions`,
        a list of their features. Raises InputError for a request that the policy cannot decide.
        """
        requests = model_input.to_dict("records") if hasattr(model_input, "to_dict") else list(model_input)
        if not all(isinstance(one, Mapping) and isinstance(one.get("context"), Mapping) for one in requests):
            raise InputError("found a request without a context; expected rows with a dictionary in the column 'context'")
        manifest = self.artifact.manifest
        catalogue = manifest.actions.catalogue
        offered = len(catalogue) if catalogue else [one.get("actions") or [] for one in requests]
        vectors = self.artifact.policy.propensities(manifest.features.batch([one["context"] for one in requests], offered))
        if catalogue:
            return [dict(zip(catalogue, vector.tolist(), strict=True)) for vector in vectors]
        return [vector[: len(one.get("actions") or [])].tolist() for vector, one in zip(vectors, requests, strict=True)]


def export_model(registry: Registry, digest: str, folder: Path, report: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write an artifact of a registry, and the records of a report on it, into a new folder.

    `MLmodel` and `data/` are what `mlflow.pyfunc.load_model` reads; `metrics.json` and `params.json` are flat, as
    `mlflow.log_metrics` and `mlflow.log_params` take them; `report.json` holds the records themselves.
    The folder appears whole or not at all. Raises InputError where the artifact fails a check, the report is no list of records or
    the folder is already there.
    """
    records = estimate_records(list(report), "report")
    if folder.exists():
        raise InputError(f"found {folder} already there; expected a new folder: name another one")
    artifact = registry.load(digest)
    manifest = artifact.manifest
    trust = {"digest": artifact.digest, "public_key": registry.public_key().public_bytes_raw().hex()}
    about = {"name": manifest.name, "decision_point": manifest.decision_point, "digest": artifact.digest}
    loading = {"loader_module": __name__, "data": "data", "python_version": ".".join(map(str, sys.version_info[:3]))}
    description = {
        "flavors": {"python_function": loading},
        "model_uuid": artifact.digest[:32],
        "utc_time_created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
        "metadata": about,
    }
    metrics = {
        NOT_IN_NAMES.sub("_", f"{record['estimator']}.{key}"): record[key]
        for record in records
        for key in METRICS
        if record.get(key) is not None
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        model = scratch / "model"  # not the scratch folder itself, which nobody else may read
        data = model / "data"
        data.mkdir(parents=True)
        shutil.copytree(registry.path(artifact.digest), data / artifact.digest)
        _write(data / TRUST, trust)
        _write(model / "MLmodel", description)  # JSON is YAML
        _write(model / "params.json", about | {"parent": manifest.parent})
        _write(model / "metrics.json", metrics)
        _write(model / "report.json", records)
        model.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def estimate_records(found: Any, source: str) -> list[dict[str, Any]]:
    """The records of a report, as `Report.to_records` and `propel ope --json` give them. Raises InputError for anything else."""
    expected = "expected a list of objects, each with 'estimator', as `propel ope --json` writes it"
    if not isinstance(found, list):
        raise InputError(f"{source}: found {KINDS.get(type(found), 'no list')}; {expected}")
    for number, record in enumerate(found, 1):
        if not isinstance(record, Mapping) or not isinstance(record.get("estimator"), str):
            kind = "an object without 'estimator'" if isinstance(record, Mapping) else KINDS.get(type(record), "no object")
            raise InputError(f"{source}: found {kind} as record {number}; {expected}")
        for key in METRICS:
            value = record.get(key)
            number_like = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not number_like:
                raise InputError(f"{source}: found {str(value)[:40]!r} as {key!r} of record {number}; expected a number or null")
    return [dict(record) for record in found]


def _load_pyfunc(path: str) -> Model:
    """What `mlflow.pyfunc.load_model` calls, with the `data` folder. Raises InputError that names the check that failed."""
    folder = Path(path)
    trust = json.loads((folder / TRUST).read_text())
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(trust["public_key"]))
    return Model(load_artifact(folder / trust["digest"], key, trust["digest"]))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
