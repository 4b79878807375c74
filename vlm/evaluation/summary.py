"""Tables for the terminal: every figure beside chance, with how sure it is."""

from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table

from vlm.evaluation.run import Comparison, Evaluation
from vlm.evaluation.tasks import (
    ArithmeticResult,
    CaptioningResult,
    CorrectedResult,
    FewShotResult,
    GeometryResult,
    MixedResult,
    RetrievalResult,
    TaskResult,
    ZeroShotResult,
)

__all__ = ["print_comparison", "print_summary"]

Row = list[str]


def print_summary(evaluation: Evaluation, console: Console) -> None:
    """One table a kind of task; small figures below are the ends of the interval."""
    for kind, columns, rows in (
        ("zero_shot", ("task", "top-1", "top-5", "top-10", "chance", "classes", "images"),
         _zero_shot),
        ("retrieval", ("task", "query", "R@1", "R@5", "R@10", "chance", "rank"),
         _retrieval),
        ("few_shot", ("task", "method", "shots", "accuracy", "chance", "ways", "episodes"),
         _few_shot),
        ("arithmetic", ("task", "R@1", "R@1 centred", "image alone", "queries", "gallery"),
         _arithmetic),
        ("mixed_retrieval", ("task", "NDCG@10", "centred", "gain", "other modality", "even"),
         _mixed),
        ("corrected_retrieval", ("task", "correction", "NDCG@10", "gain", "R@1", "queries"),
         _corrected),
        ("captioning", ("task", "CIDEr", "BLEU-4", "word for word", "images"), _captioning),
        ("geometry", ("task", "gap", "separability", "alignment", "rank: image", "text"),
         _geometry),
    ):  # fmt: skip
        found = {k: r for k, r in evaluation.results.items() if r.type == kind}
        if found:
            console.print(_table(kind, columns, rows, found))


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Each figure of both models, and whether the queries show a difference."""
    first, second = comparison.model.name, comparison.against.name
    for key, figures in comparison.differences.items():
        kind, _, name = key.replace("_", " ").partition("/")
        title = f"{kind}, {name}: {first} against {second}"
        table = Table(title=title, title_justify="left")
        for column in ("figure", "first", "second", "difference", "verdict"):
            left = column in ("figure", "verdict")
            table.add_column(column, justify="left" if left else "right", no_wrap=True)
        for figure, found in figures.items():
            short = figure.replace("_to_", "→").replace(".recall", " R@")
            table.add_row(
                short.replace(".", " ").replace("_", " "),
                f"{found.value:.3f}", f"{found.against:.3f}",
                f"{found.difference.low:+.3f} to {found.difference.high:+.3f}", found.verdict,
            )  # fmt: skip
        console.print(table)


def _table(
    kind: str,
    columns: tuple[str, ...],
    rows: Callable[[str, TaskResult], list[Row]],
    found: Mapping[str, TaskResult],
) -> Table:
    titles = {"zero_shot": "zero-shot classification"}
    table = Table(title=titles.get(kind, kind.replace("_", " ")), title_justify="left")
    for column in columns:
        left = column in ("task", "query", "method", "correction")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "task")
    for key, result in found.items():
        for row in rows(_spoken(key), result):
            table.add_row(*row)
    return table


def _spoken(key: str) -> str:
    return key.partition("/")[2].replace("_", " ")


def _percent(result: TaskResult, value: float, name: str) -> str:
    interval = result.intervals.get(name)
    if interval is None:
        return f"{value:.1%}"
    return f"{value:.1%}\n[dim]{100 * interval.low:.1f}\u2013{100 * interval.high:.1f}[/]"


def _points(result: TaskResult, value: float, name: str) -> str:
    """A difference of two fractions, in points of a hundred."""
    interval = result.intervals.get(name)
    if interval is None:
        return f"{100 * value:+.1f}"
    return f"{100 * value:+.1f}\n[dim]{100 * interval.low:+.1f} to {100 * interval.high:+.1f}[/]"


def _zero_shot(name: str, result: TaskResult) -> list[Row]:
    assert isinstance(result, ZeroShotResult)
    return [
        [
            name, _percent(result, result.top1, "top1"), _percent(result, result.top5, "top5"),
            f"{result.top10:.1%}", f"{result.chance:.2%}", str(result.classes),
            str(result.samples),
        ]
    ]  # fmt: skip


def _retrieval(name: str, result: TaskResult) -> list[Row]:
    assert isinstance(result, RetrievalResult)
    return [
        [
            name, direction.partition("_")[0],
            _percent(result, found.recall1, f"{direction}.recall1"),
            _percent(result, found.recall5, f"{direction}.recall5"),
            _percent(result, found.recall10, f"{direction}.recall10"),
            f"{found.chance:.2%}", f"{found.median_rank:g}",
        ]
        for direction, found in (
            ("image_to_text", result.image_to_text), ("text_to_image", result.text_to_image),
        )
    ]  # fmt: skip


def _few_shot(name: str, result: TaskResult) -> list[Row]:
    assert isinstance(result, FewShotResult)
    return [
        [
            name, figure.method.replace("_", " "), str(figure.shots),
            _percent(result, figure.accuracy, f"{figure.method}@{figure.shots}"),
            f"{result.chance:.1%}", str(result.ways), str(result.episodes),
        ]
        for figure in result.figures
    ]  # fmt: skip


def _arithmetic(name: str, result: TaskResult) -> list[Row]:
    assert isinstance(result, ArithmeticResult)
    return [
        [
            name, _percent(result, result.recall1, "recall1"),
            _percent(result, result.recall1_centred, "recall1_centred"),
            f"{result.image_alone1:.1%}", str(result.queries), str(result.gallery),
        ]
    ]  # fmt: skip


def _mixed(name: str, result: TaskResult) -> list[Row]:
    assert isinstance(result, MixedResult)
    return [
        [
            name, _percent(result, result.ndcg10, "ndcg10"),
            _percent(result, result.ndcg10_centred, "ndcg10_centred"),
            _points(result, result.gain, "gain"),
            f"{result.other_modality:.1%} → {result.other_modality_centred:.1%}",
            f"{result.other_modality_even:.1%}",
        ]
    ]  # fmt: skip


def _corrected(name: str, result: TaskResult) -> list[Row]:
    assert isinstance(result, CorrectedResult)
    return [
        [
            name, spoken, _percent(result, getattr(result, f"ndcg10{suffix}"), f"ndcg10{suffix}"),
            _points(result, getattr(result, f"gain{suffix}"), f"gain{suffix}") if suffix else "",
            _percent(result, getattr(result, f"recall1{suffix}"), f"recall1{suffix}"),
            str(result.queries),
        ]
        for spoken, suffix in (("none", ""), ("centred", "_centred"), ("QB-Norm", "_without_hubs"))
    ]  # fmt: skip


def _captioning(name: str, result: TaskResult) -> list[Row]:
    assert isinstance(result, CaptioningResult)
    interval = result.intervals.get("cider")
    ends = f"\n[dim]{interval.low:.2f}\u2013{interval.high:.2f}[/]" if interval else ""
    return [
        [
            name, f"{result.cider:.2f}{ends}", f"{result.bleu4:.3f}",
            _percent(result, result.exact_fraction, "exact_fraction"), str(result.images),
        ]
    ]  # fmt: skip


def _geometry(name: str, result: TaskResult) -> list[Row]:
    assert isinstance(result, GeometryResult)
    return [
        [
            name, f"{result.centroid_gap:.3f}", f"{result.linear_separability:.2f}",
            f"{result.alignment:.3f}", f"{result.image_effective_rank:.0f}",
            f"{result.text_effective_rank:.0f}",
        ]
    ]  # fmt: skip
