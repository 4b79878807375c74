import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.support import tiny_bundle, write_dataset
from vlm.config import validate_config
from vlm.errors import BundleError, ConfigError, DataError
from vlm.evaluation import (
    Evaluation,
    EvaluationConfig,
    compare,
    embed_shards,
    evaluate,
    evaluate_with_evidence,
    modality_means,
    print_comparison,
    print_summary,
    subject_of_encoder,
    write_report,
)
from vlm.evaluation.tasks import RetrievalResult, ZeroShotResult
from vlm.inference import Encoder, load_bundle


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    tiny_bundle(tmp_path / "bundle")
    return Encoder.load(tmp_path / "bundle")


TASKS: list[dict[str, Any]] = [
    {"type": "zero_shot", "data": "t", "class_field": "concept", "prompts": ["{}", "{}, {tags}"]},
    {"type": "retrieval", "data": "t", "group_field": "concept"},
    {"type": "geometry", "data": "t", "group_field": "concept"},
    {"type": "few_shot", "data": "t", "class_field": "concept", "shots": [1], "episodes": 3,
     "methods": ["prototypes", "linear_probe", "opta"]},
    {"type": "arithmetic", "data": "t", "changes": [["circle", "square"]]},
    {"type": "mixed_retrieval", "data": "t", "group_field": "concept"},
    {"type": "corrected_retrieval", "data": "t", "group_field": "concept", "bank": 8},
]  # fmt: skip


def config(tmp_path: Path, tasks: list[dict[str, Any]] = TASKS) -> EvaluationConfig:
    datasets = {"t": {"type": "shards", "location": str(tmp_path / "shards")}}
    tree = {"datasets": datasets, "tasks": tasks, "bootstrap": {"draws": 100}}
    return validate_config(EvaluationConfig, tree, source="test")


def test_every_task_is_measured_and_each_dataset_embedded_once(
    tmp_path: Path, encoder: Encoder
) -> None:
    write_dataset(tmp_path / "shards", 40)
    said: list[str] = []
    evaluation = evaluate(subject_of_encoder(encoder), config(tmp_path), say=said.append)
    assert len(said) == 1
    assert list(evaluation.results) == [f"{task['type']}/t" for task in TASKS]
    zero_shot = evaluation.results["zero_shot/t"]
    assert isinstance(zero_shot, ZeroShotResult)
    assert (zero_shot.classes, zero_shot.samples) == (16, 40)
    assert zero_shot.top1 <= zero_shot.top5 <= zero_shot.top10
    found = zero_shot.intervals["top1"]
    assert found.low <= zero_shot.top1 <= found.high
    retrieval = evaluation.results["retrieval/t"]
    assert isinstance(retrieval, RetrievalResult)
    assert retrieval.image_to_text.chance == pytest.approx(2.6 / 40)
    assert evaluation.model.fingerprint == encoder.fingerprint
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation


def test_a_class_field_that_is_missing_lists_those_there_are(
    tmp_path: Path, encoder: Encoder
) -> None:
    write_dataset(tmp_path / "shards", 8)
    settings = config(tmp_path, [{**TASKS[0], "class_field": "label"}])
    with pytest.raises(DataError, match="has no 'label' in its metadata; it has: concept, style"):
        evaluate(subject_of_encoder(encoder), settings)


def test_a_dataset_too_small_for_geometry_is_named(tmp_path: Path, encoder: Encoder) -> None:
    write_dataset(tmp_path / "shards", 4)
    with pytest.raises(DataError, match=r"shards: geometry needs at least 5 pairs, got 4"):
        evaluate(subject_of_encoder(encoder), config(tmp_path, [TASKS[2]]))


def test_a_task_on_no_dataset_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no dataset is called 'u'; there are t"):
        config(tmp_path, [{"type": "retrieval", "data": "u"}])
    with pytest.raises(ConfigError, match="tasks retrieval/t come twice"):
        config(tmp_path, [TASKS[1], TASKS[1]])


def test_a_diverged_model_is_refused_by_name(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 8)
    tiny_bundle(tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(BundleError, match="'tiny': the embeddings of 8 of 8 .* not finite"):
        embed_shards(Encoder(bundle), tmp_path / "shards")


def test_means_are_those_of_the_rows_and_a_part_is_chosen_by_id(
    tmp_path: Path, encoder: Encoder
) -> None:
    manifest = write_dataset(tmp_path / "shards", 40)
    data = embed_shards(encoder, tmp_path / "shards")
    means = modality_means(encoder, [tmp_path / "shards"], max_pairs=100)
    np.testing.assert_allclose(means.image, data.images.mean(dim=0), atol=1e-6)
    assert means.num_pairs == 40
    part = embed_shards(encoder, tmp_path / "shards", max_pairs=7)
    rows = sorted(np.argsort(manifest.sample_ids)[:7].tolist())
    assert part.keys == [data.keys[row] for row in rows]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.images_without_alt = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.links += [v for k, v in found.items() if k in ("src", "href", "xlink:href") and v]
        self.images_without_alt += tag == "img" and not found.get("alt")


def test_the_report_is_one_page_that_loads_nothing_and_comes_out_the_same_again(
    tmp_path: Path, encoder: Encoder
) -> None:
    write_dataset(tmp_path / "shards", 40)
    settings, subject = config(tmp_path), subject_of_encoder(encoder)
    with evaluate_with_evidence(subject, settings) as (evaluation, evidence):
        # Captions come from outside: none may be taken for markup.
        evidence.datasets["t"].captions[0] = ("<script>x</script>",)
        for name in ("report.html", "second.html"):
            write_report(tmp_path / name, evaluation, settings, evidence)
    text = (tmp_path / "report.html").read_text()
    assert text == (tmp_path / "second.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.links
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "script" not in page.tags
    assert page.tags.count("svg") == 4
    assert "url(http" not in text
    assert page.images_without_alt == 0
    assert page.tags.count("h1") == 1
    zero_shot = evaluation.results["zero_shot/t"]
    assert isinstance(zero_shot, ZeroShotResult)
    assert f"{100 * zero_shot.top1:.1f}%" in text
    assert encoder.fingerprint[:12] in text
    assert sorted(p.name for p in tmp_path.glob("*report*")) == ["report.html"]
    output = io.StringIO()
    print_summary(evaluation, Console(file=output, width=120))
    for shown in (f"{zero_shot.top1:.1%}", "6.25%", "few shot", "mixed retrieval", "opta"):
        assert shown in output.getvalue()


def test_two_models_are_compared_on_the_page_and_in_the_terminal(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 32)
    settings = config(tmp_path, TASKS[:2])
    subjects = []
    for seed in (0, 1):
        tiny_bundle(tmp_path / str(seed), seed=seed)
        subjects.append(subject_of_encoder(Encoder.load(tmp_path / str(seed))))
    with (
        evaluate_with_evidence(subjects[0], settings) as (ours, our),
        evaluate_with_evidence(subjects[1], settings) as (theirs, their),
    ):
        comparison = compare(ours, our, theirs, their, seed=0)
        write_report(tmp_path / "report.html", ours, settings, our, comparison)
    assert list(comparison.differences) == ["zero_shot/t", "retrieval/t"]
    top1 = comparison.differences["zero_shot/t"]["top1"]
    first, second = ours.results["zero_shot/t"], theirs.results["zero_shot/t"]
    assert isinstance(first, ZeroShotResult)
    assert isinstance(second, ZeroShotResult)
    assert (top1.value, top1.against) == (first.top1, second.top1)
    assert "Against tiny" in (tmp_path / "report.html").read_text()
    output = io.StringIO()
    print_comparison(comparison, Console(file=output, width=80))
    assert "retrieval, t: tiny against tiny" in output.getvalue()
    assert "image→text R@10" in output.getvalue()


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task["type"])
def test_a_report_of_one_kind_of_task_is_whole(
    tmp_path: Path, encoder: Encoder, task: dict[str, Any]
) -> None:
    write_dataset(tmp_path / "shards", 32)
    settings = config(tmp_path, [task])
    with evaluate_with_evidence(subject_of_encoder(encoder), settings) as (evaluation, evidence):
        write_report(tmp_path / "report.html", evaluation, settings, evidence)
    headings = {
        "zero_shot": "Zero-shot", "retrieval": "Retrieval", "geometry": "Geometry",
        "few_shot": "Few-shot", "arithmetic": "Image plus words",
        "mixed_retrieval": "Images and texts",
        "corrected_retrieval": "Text to image, corrected",
    }  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    for kind, heading in headings.items():
        assert (f"<h2>{heading}" in page) == (kind == task["type"])


def test_the_shipped_task_file_is_valid() -> None:
    import yaml

    tree = yaml.safe_load(Path("configs/evaluate/emoji.yaml").read_text())
    found = validate_config(EvaluationConfig, tree, source="emoji")
    assert found.used_datasets() == ["unseen_style_seen_concepts", "unseen_style_unseen_concepts"]
