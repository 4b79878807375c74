"""One self-contained HTML page and one terminal table about an evaluation."""

from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table

from vlm.evaluation.examples import mistakes, queries
from vlm.evaluation.geometry import Geometry
from vlm.evaluation.plots import modality_maps, recall_plot
from vlm.evaluation.run import Evaluation, Evidence
from vlm.evaluation.tasks import EvaluationConfig
from vlm.files import write_text_whole

__all__ = ["print_summary", "write_report"]

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
    "image_effective_rank": "directions that images really use",
    "text_effective_rank": "directions that captions really use",
    "image_w2_uniformity": "distance of images to an even spread; 0 is best",
    "text_w2_uniformity": "distance of captions to an even spread; 0 is best",
    "hubness_skew": "above 0, a few images answer too many queries",
    "pairs": "pairs measured",
}


def write_report(
    path: Path, evaluation: Evaluation, config: EvaluationConfig, evidence: Evidence
) -> None:
    """Write the page; it appears whole or not at all and loads nothing from anywhere."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlm.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["spoken"] = lambda name: name.replace("_", " ")
    datasets = evidence.datasets
    page = environment.get_template("report.html.j2").render(
        evaluation=evaluation,
        recall_plot=recall_plot(evaluation, config, datasets),
        maps={name: modality_maps(datasets[task.shards]) for name, task in config.geometry.items()},
        geometry={name: _geometry_rows(value) for name, value in evaluation.geometry.items()},
        mistakes={
            name: mistakes(datasets[task.shards], evidence.class_rows[name], task.class_field)
            for name, task in config.zero_shot.items()
        },
        queries={
            name: queries(datasets[task.shards], task.group_field)
            for name, task in config.retrieval.items()
        },
    )
    write_text_whole(path, page)


def print_summary(evaluation: Evaluation, console: Console) -> None:
    """Tables for the terminal: every figure beside chance."""
    if evaluation.zero_shot:
        console.print(_zero_shot_table(evaluation))
    if evaluation.retrieval:
        console.print(_retrieval_table(evaluation))
    for name, geometry in evaluation.geometry.items():
        console.print(
            f"{name}: centroid gap {geometry.centroid_gap:.3f}, separability "
            f"{geometry.linear_separability:.2f}, effective rank of images "
            f"{geometry.image_effective_rank:.0f} and captions {geometry.text_effective_rank:.0f}",
            highlight=False,
            soft_wrap=True,
        )


def _zero_shot_table(evaluation: Evaluation) -> Table:
    table = Table(title="zero-shot classification", title_justify="left")
    for column in ("task", "top-1", "top-5", "top-10", "chance", "classes", "images"):
        left = column == "task"
        table.add_column(column, justify="left" if left else "right", no_wrap=not left)
    for name, result in evaluation.zero_shot.items():
        table.add_row(
            name.replace("_", " "),
            f"{result.top1:.1%}", f"{result.top5:.1%}", f"{result.top10:.1%}",
            f"{result.chance:.2%}", str(result.classes), str(result.samples),
        )  # fmt: skip
    return table


def _retrieval_table(evaluation: Evaluation) -> Table:
    table = Table(title="retrieval", title_justify="left")
    for column in ("task", "direction", "R@1", "R@5", "R@10", "chance", "median rank"):
        left = column in ("task", "direction")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "task")
    for name, both in evaluation.retrieval.items():
        directions = {"image to text": both.image_to_text, "text to image": both.text_to_image}
        for direction, found in directions.items():
            table.add_row(
                name.replace("_", " "), direction, f"{found.recall1:.1%}", f"{found.recall5:.1%}",
                f"{found.recall10:.1%}", f"{found.chance:.2%}", f"{found.median_rank:g}",
            )  # fmt: skip
    return table


def _geometry_rows(geometry: Geometry) -> list[tuple[str, str, str]]:
    values: dict[str, Any] = geometry.model_dump()
    return [
        (name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value),
         _GEOMETRY_NOTES[name])
        for name, value in values.items()
    ]  # fmt: skip
