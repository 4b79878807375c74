"""Plots of the report, as SVG that takes the page's colours and fonts and loads nothing."""

import io
from collections.abc import Mapping
from typing import Any, Final

import matplotlib as mpl
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from vlm.evaluation.ranks import best_positive_ranks
from vlm.evaluation.run import EmbeddedDataset, Evaluation
from vlm.evaluation.tasks import EvaluationConfig

__all__ = ["modality_maps", "recall_plot"]

_IMAGE_COLOUR, _TEXT_COLOUR, _CHANCE_COLOUR = "#d9622b", "#2b7bd9", "#8a8a8a"
_MAP_POINTS = 600
# Stands for the page's ink while matplotlib draws, since that knows no `currentColor`.
_INK: Final = "#010203"
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text: readable by machines, in the page's font
    "svg.hashsalt": "vlm",  # element ids depend on the content alone, so equal pages are equal
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "font.size": 10,
    "axes.titlesize": 11,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def recall_plot(
    evaluation: Evaluation, config: EvaluationConfig, datasets: Mapping[str, EmbeddedDataset]
) -> str:
    """Recall at every k from 1 to 100, both directions of each retrieval task."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 4.2), layout="constrained")
        axes = figure.subplots()
        ks = torch.arange(1, 101)
        for number, (name, task) in enumerate(config.retrieval.items()):
            data = datasets[task.shards]
            groups = data.groups(task.group_field)
            line = ("-", "--", ":", "-.")[number % 4]
            for label, queries, gallery, colour in (
                ("image to text", data.images, data.texts, _IMAGE_COLOUR),
                ("text to image", data.texts, data.images, _TEXT_COLOUR),
            ):
                ranks = best_positive_ranks(queries, gallery, groups, groups)
                curve = (ranks[None, :] < ks[:, None]).double().mean(dim=1)
                spoken = f"{label}, {name.replace('_', ' ')}"
                axes.plot(ks, curve, line, color=colour, label=spoken)
            chance = evaluation.retrieval[name].text_to_image.chance
            axes.plot(ks, (ks * chance).clamp(max=1), line, color=_CHANCE_COLOUR, linewidth=1)
        axes.set(xscale="log", xlabel="k (gray: chance)", ylabel="recall@k", ylim=(0, 1))
        axes.set_xticks([1, 5, 10, 50, 100], ["1", "5", "10", "50", "100"])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        if config.retrieval:
            figure.legend(loc="outside lower left", frameon=False)
        return _svg(figure)


def modality_maps(data: EmbeddedDataset) -> list[tuple[str, str]]:
    """Both modalities on their first two principal axes: title and plot, as they are and centred.

    The first pairs of the dataset stand for all.
    """
    images, texts = data.images[:_MAP_POINTS], data.texts[:_MAP_POINTS]
    centred = (images - images.mean(dim=0), texts - texts.mean(dim=0))
    return [
        ("As embedded", _scatter(images, texts)),
        ("Each modality centred", _scatter(*centred)),
    ]


def _scatter(images: Float[Tensor, "pair dim"], texts: Float[Tensor, "pair dim"]) -> str:
    points = _principal(torch.cat([images, texts]))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4, 4), layout="constrained")
        axes = figure.subplots()
        for rows, colour, label in zip(
            points.split(len(images)),
            (_IMAGE_COLOUR, _TEXT_COLOUR),
            ("images", "captions"),
            strict=True,
        ):
            axes.scatter(rows[:, 0], rows[:, 1], s=7, alpha=0.55, color=colour, label=label)
        axes.set(aspect="equal")
        axes.set_axis_off()
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        return _svg(figure)


def _principal(rows: Float[Tensor, "row dim"]) -> Float[Tensor, "row 2"]:
    centred = rows - rows.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    return centred @ directions[:2].T


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
