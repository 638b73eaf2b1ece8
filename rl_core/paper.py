"""Where a method comes from: its paper, its equations, and the origin of every default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Paper:
    """A published source. `defaults` says of every field of a method where its default is from."""

    source: str
    """Its id on arXiv, or its DOI."""
    title: str
    spec: str
    """Name of the page in docs that its equations are checked against."""
    equations: Mapping[str, str]
    """What is computed, by its name in the paper."""
    defaults: Mapping[str, str]
    differs: Mapping[str, str] = field(default_factory=dict)
    """Where paper, official code and this implementation disagree, and which was taken."""
