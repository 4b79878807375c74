"""One self-contained HTML page and one terminal table about an evaluation."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vlm.data.samples import Sample
from vlm.evaluation.geometry import Geometry
from vlm.evaluation.ranks import best_positive_ranks, top_matches
from vlm.evaluation.run import EmbeddedDataset, Evaluation
from vlm.evaluation.tasks import EvaluationConfig
from vlm.files import write_text_whole

__all__ = ["print_summary", "write_report"]

_IMAGE_COLOUR, _TEXT_COLOUR, _CHANCE_COLOUR = "#d9622b", "#2b7bd9", "#8a8a8a"
_MAP_POINTS = 600
_EXAMPLES = 8
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


@dataclass(frozen=True, kw_only=True)
class _Thumbnail:
    source: str
    label: str
    right: bool


@dataclass(frozen=True, kw_only=True)
class _Query:
    text: str
    rank: int
    hits: list[_Thumbnail]


def write_report(
    path: Path,
    evaluation: Evaluation,
    config: EvaluationConfig,
    datasets: Mapping[Path, EmbeddedDataset],
) -> None:
    """Write the page; it appears whole or not at all and loads nothing from anywhere."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlm.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        evaluation=evaluation,
        recall_plot=_recall_plot(evaluation, config, datasets),
        maps={name: _maps(datasets[config.geometry[name].shards]) for name in evaluation.geometry},
        geometry={name: _geometry_rows(value) for name, value in evaluation.geometry.items()},
        examples={
            name: _queries(datasets[task.shards], task.group_field)
            for name, task in config.retrieval.items()
        },
        spoken=lambda name: name.replace("_", " "),
    )
    write_text_whole(path, page)


def print_summary(evaluation: Evaluation, console: Console) -> None:
    """Tables for the terminal: every figure beside chance."""
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
    console.print(table)
    table = Table(title="retrieval", title_justify="left")
    for column in ("task", "direction", "R@1", "R@5", "R@10", "chance", "median rank"):
        left = column in ("task", "direction")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "task")
    for name, both in evaluation.retrieval.items():
        directions = {"image to text": both.image_to_text, "text to image": both.text_to_image}
        for direction, found in directions.items():
            table.add_row(
                name.replace("_", " "), direction, f"{found.recall1:.1%}", f"{found.recall5:.1%}",
                f"{found.recall10:.1%}", f"{found.chance:.2%}", f"{found.median_rank:.0f}",
            )  # fmt: skip
    console.print(table)
    for name, geometry in evaluation.geometry.items():
        console.print(
            f"{name}: centroid gap {geometry.centroid_gap:.3f}, separability "
            f"{geometry.linear_separability:.2f}, effective rank of images "
            f"{geometry.image_effective_rank:.0f} and captions {geometry.text_effective_rank:.0f}",
            highlight=False,
            soft_wrap=True,
        )


def _recall_plot(
    evaluation: Evaluation, config: EvaluationConfig, datasets: Mapping[Path, EmbeddedDataset]
) -> str:
    """Recall at every k from 1 to 100, both directions of each retrieval task, as inline SVG."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    ks = torch.arange(1, 101)
    for number, (name, task) in enumerate(config.retrieval.items()):
        data = datasets[task.shards]
        groups = data.groups(task.group_field)
        style = ("-", "--", ":", "-.")[number % 4]
        for label, queries, gallery, colour in (
            ("image to text", data.images, data.texts, _IMAGE_COLOUR),
            ("text to image", data.texts, data.images, _TEXT_COLOUR),
        ):
            ranks = best_positive_ranks(queries, gallery, groups, groups)
            curve = (ranks[None, :] < ks[:, None]).double().mean(dim=1)
            spoken = name.replace("_", " ")
            axes.plot(ks, curve, style, color=colour, label=f"{label}, {spoken}")
        chance = evaluation.retrieval[name].text_to_image.chance
        axes.plot(ks, (ks * chance).clamp(max=1), style, color=_CHANCE_COLOUR, linewidth=1)
    axes.set(xscale="log", xlabel="k (gray: chance)", ylabel="recall@k", ylim=(0, 1))
    axes.set_xticks([1, 5, 10, 50, 100], ["1", "5", "10", "50", "100"])
    axes.grid(alpha=0.25)
    if config.retrieval:
        axes.legend(fontsize=8, frameon=False)
    return _svg(figure)


def _maps(data: EmbeddedDataset) -> str:
    """Both modalities on their first two principal axes, as they are and centred."""
    count = min(_MAP_POINTS, len(data.images))
    images, texts = data.images[:count], data.texts[:count]
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    for axes, title, pair in zip(
        figure.subplots(1, 2),
        ("as embedded", "each modality centred"),
        ((images, texts), (images - images.mean(dim=0), texts - texts.mean(dim=0))),
        strict=True,
    ):
        points = _principal(torch.cat(pair)).reshape(2, count, 2)
        for rows, colour, label in zip(
            points, (_IMAGE_COLOUR, _TEXT_COLOUR), ("images", "captions"), strict=True
        ):
            axes.scatter(rows[:, 0], rows[:, 1], s=5, alpha=0.55, color=colour, label=label)
        axes.set(title=title, xticks=[], yticks=[], aspect="equal")
        axes.legend(fontsize=8, frameon=False)
    return _svg(figure)


def _principal(rows: Float[Tensor, "row dim"]) -> Float[Tensor, "row 2"]:
    centred = rows - rows.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    return centred @ directions[:2].T


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # A fixed salt and no date make equal evaluations give equal pages.
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _geometry_rows(geometry: Geometry) -> list[tuple[str, str, str]]:
    values: dict[str, Any] = geometry.model_dump()
    return [
        (name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value),
         _GEOMETRY_NOTES[name])
        for name, value in values.items()
    ]  # fmt: skip


def _queries(data: EmbeddedDataset, group_field: str | None) -> dict[str, list[_Query]]:
    """Captions that find their images best and worst, with what they find first.

    The best are spread over the dataset, since many are found at once.
    """
    groups = data.groups(group_field)
    ranks = best_positive_ranks(data.texts, data.images, groups, groups)
    found = (ranks == 0).nonzero().flatten()
    spread = torch.linspace(0, max(len(found) - 1, 0), min(_EXAMPLES, len(found))).long()
    worst = ranks.argsort(descending=True, stable=True)[:_EXAMPLES]
    return {
        "found at once": [_query(data, groups, ranks, int(i)) for i in found[spread]],
        "found last": [_query(data, groups, ranks, int(i)) for i in worst],
    }


def _query(data: EmbeddedDataset, groups: Tensor, ranks: Tensor, index: int) -> _Query:
    hits = top_matches(data.texts[index : index + 1], data.images, min(5, len(data.images)))[0]
    return _Query(
        text=data.samples[index].text,
        rank=int(ranks[index]) + 1,
        hits=[
            _Thumbnail(
                source=_data_uri(data.samples[hit]),
                label=data.samples[hit].text,
                right=bool(groups[hit] == groups[index]),
            )
            for hit in hits.tolist()
        ],
    )


def _data_uri(sample: Sample) -> str:
    with Image.open(io.BytesIO(sample.image)) as image:
        thumbnail = image.convert("RGB")
    thumbnail.thumbnail((72, 72))
    buffer = io.BytesIO()
    thumbnail.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
