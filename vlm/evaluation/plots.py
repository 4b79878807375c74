"""Plots of the report, as SVG that takes the page's colours and fonts and loads nothing."""

import io
from collections.abc import Mapping
from typing import Any, Final

import matplotlib as mpl
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from vlm.evaluation.embed import EmbeddedDataset
from vlm.evaluation.tasks import Outcome, Result, RetrievalResult
from vlm.evaluation.tasks.zero_shot import ReliabilityBin

__all__ = ["modality_maps", "recall_plot", "reliability_plot"]

_IMAGE_COLOUR, _TEXT_COLOUR, _CHANCE_COLOUR = "#d9622b", "#2b7bd9", "#8a8a8a"
_MAP_POINTS = 600
_LINES: Final = ("-", "--", ":", "-.")
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


def recall_plot(outcomes: Mapping[str, Outcome[Result]]) -> str:
    """Recall at every k from 1 to 100, both directions of each retrieval task, by name."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 4.2), layout="constrained")
        axes = figure.subplots()
        ks = torch.arange(1, 101)
        for number, (name, outcome) in enumerate(outcomes.items()):
            line, result = _LINES[number % len(_LINES)], outcome.result
            assert isinstance(result, RetrievalResult)
            for label, ranks, colour in (
                ("image to text", outcome.evidence["image_ranks"], _IMAGE_COLOUR),
                ("text to image", outcome.evidence["text_ranks"], _TEXT_COLOUR),
            ):
                curve = (ranks[None, :] < ks[:, None]).double().mean(dim=1)
                spoken = f"{label}, {name.replace('_', ' ')}"
                axes.plot(ks, curve, line, color=colour, linewidth=2, label=spoken)
            chance = result.text_to_image.chance
            axes.plot(ks, (ks * chance).clamp(max=1), line, color=_CHANCE_COLOUR, linewidth=1)
        axes.set(xscale="log", xlabel="k (gray: chance)", ylabel="recall@k", ylim=(0, 1))
        axes.set_xticks([1, 5, 10, 50, 100], ["1", "5", "10", "50", "100"])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        figure.legend(loc="outside lower left", frameon=False)
        return _svg(figure)


def reliability_plot(bins: list[ReliabilityBin]) -> str:
    """Accuracy against probability: on the diagonal, a model is as sure as it is right."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], "--", color=_CHANCE_COLOUR, linewidth=1)
        most = max(found.count for found in bins)
        axes.scatter(
            [found.confidence for found in bins],
            [found.accuracy for found in bins],
            s=[12 + 160 * found.count / most for found in bins],
            color=_TEXT_COLOUR,
            alpha=0.75,
            linewidths=0,
        )
        axes.plot(
            [found.confidence for found in bins],
            [found.accuracy for found in bins],
            color=_TEXT_COLOUR,
            linewidth=1,
        )
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the chosen class")
        axes.set_ylabel("share that is right")
        axes.grid(alpha=0.25)
        return _svg(figure)


def modality_maps(data: EmbeddedDataset) -> list[tuple[str, str]]:
    """Both modalities on their first two principal axes: title and plot, as they are and centred.

    The first pairs of the dataset stand for all.
    """
    images, texts = data.images[:_MAP_POINTS], data.first_texts[:_MAP_POINTS]
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
