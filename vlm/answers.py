"""What is answered to who asks a model, in this process or over HTTP."""

from dataclasses import dataclass
from typing import Any

__all__ = ["Found", "Label", "Shown"]


@dataclass(frozen=True, kw_only=True)
class Label:
    """One label of one image."""

    label: str
    probability: float
    score: float
    """Cosine similarity, -1 to 1."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What one image shows."""

    labels: list[Label]
    """Best first."""
    none_of_these: bool | None
    """None where no threshold was given."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One result of a search."""

    id: str
    score: float
    text: str | None
    metadata: dict[str, Any]
