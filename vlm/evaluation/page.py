"""One self-contained HTML page about an evaluation."""

import typing
from pathlib import Path
from typing import Any

import jinja2

from vlm.evaluation.config import EvaluationConfig
from vlm.evaluation.examples import caption_examples, changes, mistakes, queries
from vlm.evaluation.run import Comparison, Evaluation, Evidence
from vlm.evaluation.tasks import (
    ArithmeticTask,
    CaptioningResult,
    GeometryResult,
    Result,
    RetrievalTask,
    ZeroShotResult,
)
from vlm.files import write_text_whole

__all__ = ["write_report"]

_GEOMETRY_NOTES = {
    "centroid_gap": "distance between the mean image and the mean caption; 0 is no gap",
    "pair_distance": "mean distance of an image and its caption",
    "linear_separability": "how well a line tells images from captions; 0.5 is not at all",
    "relative_gap": "matched distance against spread within a modality",
    "alignment": "mean squared distance of pairs; lower is closer",
    "image_uniformity": "spread of images; lower is more even",
    "text_uniformity": "spread of captions; lower is more even",
    "cross_uniformity": "spread of images against other captions",
    "uniformity_floor": "what a perfectly even spread would have",
    "image_uniformity_above_floor": "how far the images are from it",
    "text_uniformity_above_floor": "how far the captions are from it",
    "image_effective_rank": "directions that images really use",
    "text_effective_rank": "directions that captions really use",
    "image_w2_uniformity": "distance of images to an even spread; 0 is best",
    "text_w2_uniformity": "distance of captions to an even spread; 0 is best",
    "hubness_skew": "above 0, a few images answer too many queries",
    "tolerance": "mean cosine of different images of one group",
    "joint_v_measure": "how well clusters of both modalities are the groups; 1 is best",
    "pairs": "pairs measured",
}


def write_report(
    path: Path,
    evaluation: Evaluation,
    config: EvaluationConfig,
    evidence: Evidence,
    comparison: Comparison | None = None,
) -> None:
    """Write the page; it appears whole or not at all and loads nothing from anywhere."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlm.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["spoken"] = lambda name: name.replace("_", " ").replace(".", ", ")
    page = environment.get_template("page.html.j2").render(
        evaluation=evaluation,
        comparison=comparison,
        kinds=_by_kind(evaluation),
        level=f"{evaluation.bootstrap.level:.0%}",
        **_plots(evaluation, config, evidence),
        **_examples(evaluation, config, evidence),
    )
    write_text_whole(path, page)


def _by_kind(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """The results of every kind by name of the task, none for a kind without tasks."""
    union, _ = typing.get_args(Result)
    kinds: dict[str, dict[str, Any]] = {
        kind.model_fields["type"].default: {} for kind in typing.get_args(union)
    }
    for key, result in evaluation.results.items():
        kinds[result.type][key.partition("/")[2]] = result
    return kinds


def _plots(evaluation: Evaluation, config: EvaluationConfig, evidence: Evidence) -> dict[str, Any]:
    """What is drawn, by name of the task."""
    # matplotlib takes half a second, and each process that trains imports this module.
    from vlm.evaluation.plots import (  # noqa: PLC0415 - as said above
        modality_maps,
        recall_plot,
        reliability_plot,
    )

    retrieval = {
        task.label: evidence.outcomes[key]
        for key, task in config.by_key()
        if isinstance(task, RetrievalTask) and key in evidence.outcomes
    }
    zero_shot = {
        key.partition("/")[2]: r
        for key, r in evaluation.results.items()
        if isinstance(r, ZeroShotResult)
    }
    geometry = {
        key.partition("/")[2]: r
        for key, r in evaluation.results.items()
        if isinstance(r, GeometryResult)
    }
    return {
        "recall_plot": recall_plot(retrieval) if retrieval else "",
        "reliability": {n: reliability_plot(r.reliability) for n, r in zero_shot.items()},
        "maps": {n: modality_maps(evidence.datasets[r.data]) for n, r in geometry.items()},
        "geometry": {n: _geometry_rows(r) for n, r in geometry.items()},
    }


def _examples(
    evaluation: Evaluation, config: EvaluationConfig, evidence: Evidence
) -> dict[str, Any]:
    """What is shown with thumbnails, by name of the task."""
    found: dict[str, dict[str, Any]] = {
        name: {} for name in ("mistakes", "queries", "changes", "captions")
    }
    for key, task in config.by_key():
        if key not in evidence.outcomes:
            continue
        data, outcome = evidence.datasets[task.data], evidence.outcomes[key]
        result = evaluation.results[key]
        if isinstance(result, ZeroShotResult):
            found["mistakes"][task.label] = mistakes(data, outcome)
        elif isinstance(task, RetrievalTask):
            found["queries"][task.label] = queries(data, outcome, task.group_field)
        elif isinstance(task, ArithmeticTask):
            found["changes"][task.label] = changes(data, outcome, task.changes)
        elif isinstance(result, CaptioningResult):
            found["captions"][task.label] = {
                kind: list(zip(chosen, caption_examples(data, [e.row for e in chosen]),
                               strict=True))
                for kind, chosen in (("closest to a person's", result.best),
                                     ("farthest from a person's", result.worst))
            }  # fmt: skip
    return found


def _geometry_rows(geometry: GeometryResult) -> list[tuple[str, str, str]]:
    values: dict[str, Any] = geometry.model_dump(exclude={"type", "data", "intervals"})
    return [
        (name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value),
         _GEOMETRY_NOTES[name])
        for name, value in values.items()
        if value is not None
    ]  # fmt: skip
