"""What a run folder tells about its run: records, time, configuration, evaluation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlm.errors import CheckpointError
from vlm.files import write_text_whole
from vlm.train.ledger import PLACES

__all__ = [
    "SECONDS",
    "Run",
    "find_runs",
    "flat",
    "read_records",
    "read_run",
    "truncate_records",
]

SECONDS = "seconds.jsonl"
"""The ledger: a line for every window of steps, never rewritten."""
Record = dict[str, float | int]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder, read."""

    name: str
    folder: Path
    config: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    """In the order of steps."""
    ledger: list[Record] = field(default_factory=list)
    """Seconds by place of each window, in the order they were spent."""
    evaluation: dict[str, Any] | None = None

    @property
    def last(self) -> Record:
        """The newest record, empty before the first."""
        return self.records[-1] if self.records else {}

    @property
    def modified(self) -> float:
        """When the run last said something, in seconds since 1970."""
        metrics = self.folder / "metrics.jsonl"
        return (metrics if metrics.is_file() else self.folder).stat().st_mtime

    def seconds(self) -> dict[str, float]:
        """Time by place of the ledger, and `redone`: steps done again after a resume."""
        found = dict.fromkeys((*PLACES, "redone"), 0.0)
        furthest = -1.0
        for line in self.ledger:
            again = line["step"] < furthest or (line["step"] == furthest and line["compute"] > 0)
            furthest = max(furthest, line["step"])
            for place in PLACES:
                found["redone" if again else place] += line.get(place, 0.0)
        return found

    def goodput(self) -> float | None:
        """The fraction of time, 0 to 1, in which the model computed a step that was kept."""
        seconds = self.seconds()
        total = sum(seconds.values())
        return seconds["compute"] / total if total else None


def read_run(folder: Path) -> Run:
    """Read a run folder, finished or not.

    Raises:
        CheckpointError: If it is none, or its configuration is damaged.
    """
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        message = f"{folder}: not a run, its config.yaml cannot be read ({error})"
        raise CheckpointError(message) from error
    return Run(
        name=str(config.get("name", folder.name)),
        folder=folder,
        config=config,
        records=read_records(folder / "metrics.jsonl"),
        ledger=read_records(folder / SECONDS),
        evaluation=_json(folder / "evaluation.json"),
    )


def find_runs(parent: Path) -> list[Run]:
    """All runs in a folder, the newest first."""
    runs = [read_run(path.parent) for path in parent.glob("*/config.yaml")]
    return sorted(runs, key=lambda run: run.modified, reverse=True)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a configuration, as overrides spell them."""
    if isinstance(tree, dict):
        items: Sequence[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; the last may be torn while a run writes."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def truncate_records(path: Path, step: int) -> None:
    """Drop records after `step`, which a resumed run will write again, and any torn last line."""
    if path.is_file():
        kept = [
            json.dumps(record) + "\n" for record in read_records(path) if record["step"] <= step
        ]
        write_text_whole(path, "".join(kept))


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
