"""Run the tasks of a configuration on one model, on all ranks."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vlm.config import Config
from vlm.distributed import World
from vlm.errors import VlmError
from vlm.evaluation.bootstrap import BootstrapConfig, Difference, differences, intervals
from vlm.evaluation.config import EvaluationConfig
from vlm.evaluation.datasets import OpenedDataset
from vlm.evaluation.embed import EmbeddedDataset, embed_dataset
from vlm.evaluation.model import Subject
from vlm.evaluation.tasks import Context, Outcome, Result

__all__ = [
    "Comparison",
    "Evaluation",
    "Evidence",
    "ModelFacts",
    "compare",
    "evaluate",
    "evaluate_with_evidence",
]


class ModelFacts(Config):
    """Which model was evaluated."""

    name: str
    fingerprint: str
    dim: int


class Evaluation(Config):
    """The results by `kind/name` of the task, as `evaluation.json` holds them."""

    model: ModelFacts
    results: dict[str, Result]
    failures: dict[str, str] = {}
    """Why a task gave no result, by its `kind/name`."""
    bootstrap: BootstrapConfig
    """How the intervals were drawn."""
    seconds: float


class Comparison(Config):
    """One model against another, as `comparison.json` holds it."""

    model: ModelFacts
    against: ModelFacts
    differences: dict[str, dict[str, Difference]]
    """By task and figure."""
    bootstrap: BootstrapConfig


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the figures were computed from, for the report."""

    datasets: dict[str, EmbeddedDataset]
    """By name."""
    outcomes: dict[str, Outcome[Result]]
    """By task."""


def evaluate(
    subject: Subject,
    config: EvaluationConfig,
    world: World | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Run every task; nothing is written. Every rank calls it and gets the same figures.

    Args:
        subject: The model, the same on every rank.
        config: The tasks.
        world: Who takes part; by default this process alone.
        say: Told a line a dataset on the first rank.

    Raises:
        DataError: If a dataset cannot be read, is too small, or lacks a field that a task names.
        BundleError: If the model gives embeddings that are no numbers, or cannot do a task.
    """
    found = evaluate_with_evidence(subject, config, world, say=say, fail_fast=True)
    with found as (evaluation, _):
        return evaluation


@contextmanager
def evaluate_with_evidence(
    subject: Subject,
    config: EvaluationConfig,
    world: World | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
    fail_fast: bool = False,
) -> Iterator[tuple[Evaluation, Evidence]]:
    """As `evaluate`, with what the figures were made of; the datasets stay open within.

    A task that cannot be done does not cost the others their results, unless `fail_fast`; it is
    among the evaluation's `failures`. All ranks find the same, from the same embeddings.
    """
    world = world or World()
    start = time.monotonic()
    opened: list[OpenedDataset] = []
    try:
        # All are opened before the first is embedded, so that a wrong path is told at once.
        for name in config.used_datasets():
            opened.append(config.datasets[name].open())
        datasets: dict[str, EmbeddedDataset] = {}
        for name, source in zip(config.used_datasets(), opened, strict=True):
            began = time.monotonic()
            data = datasets[name] = embed_dataset(
                subject, source, world, say=say if world.is_main else lambda _: None
            )
            rate = len(data.keys) / max(time.monotonic() - began, 1e-9)
            if world.is_main:
                say(f"{name}: {len(data.keys)} pairs embedded, {rate:.0f} pairs/s")
        context = Context(subject=subject, datasets=datasets, world=world, seed=config.seed)
        outcomes: dict[str, Outcome[Result]] = {}
        failures: dict[str, str] = {}
        for key, task in config.by_key():
            try:
                outcomes[key] = task.measure(context)
            except VlmError as error:
                failures[key] = str(error)
                if fail_fast:
                    raise
        results = {
            key: outcome.result.model_copy(
                update={"intervals": intervals(outcome.scores, config.bootstrap, seed=config.seed)}
            )
            for key, outcome in outcomes.items()
        }
        evaluation = Evaluation(
            model=_facts(subject),
            results=results,
            failures=failures,
            bootstrap=config.bootstrap,
            seconds=round(time.monotonic() - start, 2),
        )
        yield evaluation, Evidence(datasets=datasets, outcomes=outcomes)
    finally:
        for dataset in opened:
            dataset.close()


def compare(
    evaluation: Evaluation, ours: Evidence, against: Evaluation, theirs: Evidence, *, seed: int
) -> Comparison:
    """Every figure with a known uncertainty of two models that did the same tasks.

    Raises:
        ValueError: If they did not.
    """
    return Comparison(
        model=evaluation.model,
        against=against.model,
        differences={
            key: differences(
                outcome.scores, theirs.outcomes[key].scores, evaluation.bootstrap, seed=seed
            )
            for key, outcome in ours.outcomes.items()
            if outcome.scores and key in theirs.outcomes
        },
        bootstrap=evaluation.bootstrap,
    )


def _facts(subject: Subject) -> ModelFacts:
    return ModelFacts(name=subject.name, fingerprint=subject.fingerprint, dim=subject.dim)
