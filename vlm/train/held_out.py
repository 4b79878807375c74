"""Held-out figures in the middle of a run: all ranks evaluate the checkpoint just saved.

What is judged is what `vlm export` would write: the moving average of weights where the run keeps
one, whatever the engine. So a figure always belongs to weights that are there.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from vlm.config import load_config
from vlm.distributed import World, barrier
from vlm.errors import ConfigError
from vlm.evaluation import Evaluation, EvaluationConfig, evaluate
from vlm.evaluation.model import subject_of_bundle
from vlm.files import write_text_whole
from vlm.train.config import TrainConfig
from vlm.train.export import load_run
from vlm.train.memory import LossMemory
from vlm.train.records import read_records, truncate_records

__all__ = ["EVALUATIONS", "HeldOut", "step_of_drop"]

EVALUATIONS: Final = "evaluations.jsonl"


class HeldOut:
    """Evaluates a run at regular steps, and holds the weights of guarded terms after a drop.

    Args:
        config: Of the run; without an `evaluation` section nothing is ever due.
        memory: Where the limits of weights are kept.
        total_steps: Of the run.
        world: The ranks; all call every method.

    Raises:
        ConfigError: If the tasks cannot be read, or a guard asks for a recall that no task gives.
    """

    def __init__(
        self, config: TrainConfig, memory: LossMemory, *, total_steps: int, world: World
    ) -> None:
        self._config = config
        self._memory = memory
        self._total_steps = total_steps
        self._world = world
        self._path = config.run_folder / EVALUATIONS
        self._recalls: dict[int, float] = {}
        self._tasks: EvaluationConfig | None = None
        if config.evaluation is None:
            return
        self._tasks = load_config(EvaluationConfig, config.evaluation.tasks, [])
        if config.guards_recall and not any(t.type == "retrieval" for t in self._tasks.tasks):
            message = (
                f"{config.evaluation.tasks}: a guard of the loss has recall_drop, and no task is "
                f"of type retrieval; add one, or leave recall_drop out"
            )
            raise ConfigError(message)

    def is_due(self, step: int) -> bool:
        """Whether the run is evaluated after this step; its checkpoint must be complete then."""
        section = self._config.evaluation
        return section is not None and (step % section.every == 0 or step == self._total_steps)

    def evaluate(self, step: int) -> str:
        """Evaluate the newest checkpoint, which is of this step; returns a line for people."""
        assert self._tasks is not None
        subject = subject_of_bundle(
            load_run(self._config.run_folder), device=str(self._world.device)
        )
        found = evaluate(subject, self._tasks, self._world)
        figures = _figures(found)
        if self._world.is_main:
            samples = step * self._config.global_batch
            record = {"step": step, "samples": samples, "seconds": found.seconds, **figures}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            whole = found.model_dump_json(indent=2) + "\n"
            write_text_whole(self._config.run_folder / "evaluation.json", whole)
        self._remember(step, figures)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in _headline(figures).items())
        return f"evaluated at step {step} in {found.seconds:.1f} s: {shown}"

    def restore(self, step: int) -> None:
        """Go on from this step: forget what came after, and do what was left undone there."""
        if self._tasks is None:
            return
        self._recalls = {}
        kept = [record for record in read_records(self._path) if record["step"] <= step]
        barrier(self._world)  # all have read before the file is cut
        if self._world.is_main:
            truncate_records(self._path, step)
        for record in kept:
            self._remember(record["step"], record)
        if step and self.is_due(step) and step not in {record["step"] for record in kept}:
            self.evaluate(step)

    def _remember(self, step: int, figures: Mapping[str, Any]) -> None:
        recalls = [float(v) for name, v in figures.items() if _is_recall(name)]
        if not recalls:
            return
        self._recalls[step] = sum(recalls) / len(recalls)
        for term in self._config.loss:
            guard = getattr(term, "guard", None)
            if guard is None or guard.recall_drop is None:
                continue
            dropped = step_of_drop(self._recalls, guard.recall_drop)
            if dropped is not None:
                limit = term.weight_at(dropped / self._total_steps)
                self._memory.limit(f"{term.type}/weight_limit", limit)


def step_of_drop(recalls: Mapping[int, float], drop: float) -> int | None:
    """The first step whose recall lies more than `drop` under the best of those before it."""
    best = 0.0
    for step, recall in sorted(recalls.items()):
        if recall < best - drop:
            return step
        best = max(best, recall)
    return None


def _is_recall(name: str) -> bool:
    return name.startswith("retrieval/") and name.endswith(".recall1")


def _headline(figures: Mapping[str, float]) -> dict[str, float]:
    ends = (".top1", ".recall1", ".centroid_gap")
    return {name: value for name, value in figures.items() if name.endswith(ends)}


def _figures(evaluation: Evaluation) -> dict[str, float]:
    """Every figure of every task, as `kind/name.figure`."""
    flat: dict[str, float] = {}
    for key, result in evaluation.results.items():
        tree = result.model_dump(mode="json", exclude={"intervals"})
        flat.update(_flattened(key, tree))
    return flat


def _flattened(name: str, tree: Mapping[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, float):
            flat[f"{name}.{key}"] = value
        elif isinstance(value, dict):
            flat.update(_flattened(f"{name}.{key}", value))
    return flat
