import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.support import tiny_bundle, write_dataset
from vlm.config import validate_config
from vlm.errors import BundleError, DataError
from vlm.evaluation import (
    Evaluation,
    EvaluationConfig,
    evaluate,
    modality_means,
    print_summary,
    write_report,
)
from vlm.evaluation.run import embed_dataset
from vlm.inference import Encoder, load_bundle


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    tiny_bundle(tmp_path / "bundle")
    return Encoder.load(tmp_path / "bundle")


def config(tmp_path: Path, field: str = "concept") -> EvaluationConfig:
    shards = str(tmp_path / "shards")
    tree = {
        "zero_shot": {"t": {"shards": shards, "class_field": field,
                            "prompts": ["{text}", "{text}, {tags}"]}},
        "retrieval": {"t": {"shards": shards, "group_field": field}},
        "geometry": {"t": {"shards": shards}},
    }  # fmt: skip
    return validate_config(EvaluationConfig, tree, source="test")


def test_every_task_is_measured_and_each_dataset_embedded_once(
    tmp_path: Path, encoder: Encoder
) -> None:
    write_dataset(tmp_path / "shards", 40)
    said: list[str] = []
    evaluation, evidence = evaluate(encoder, config(tmp_path), say=said.append)
    assert len(said) == len(evidence.datasets) == 1
    assert evidence.class_rows["t"].shape == (16, encoder.dim)
    zero_shot = evaluation.zero_shot["t"]
    assert (zero_shot.classes, zero_shot.samples) == (16, 40)
    assert zero_shot.top1 <= zero_shot.top5 <= zero_shot.top10
    assert evaluation.retrieval["t"].image_to_text.chance == pytest.approx(2.6 / 40)
    assert evaluation.geometry["t"].pairs == 40
    assert evaluation.model.fingerprint == encoder.fingerprint
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation


def test_evaluating_twice_gives_equal_figures(tmp_path: Path, encoder: Encoder) -> None:
    write_dataset(tmp_path / "shards", 40)
    runs = [evaluate(encoder, config(tmp_path), say=lambda _: None)[0] for _ in range(2)]
    first, second = (run.model_dump(exclude={"seconds"}) for run in runs)
    assert first == second


def test_a_class_field_that_is_missing_lists_those_there_are(
    tmp_path: Path, encoder: Encoder
) -> None:
    write_dataset(tmp_path / "shards", 8)
    with pytest.raises(
        DataError, match="has no 'label' in its .json; it has: concept, style, tags"
    ):
        evaluate(encoder, config(tmp_path, "label"), say=lambda _: None)


def test_a_dataset_too_small_for_geometry_is_named(tmp_path: Path, encoder: Encoder) -> None:
    write_dataset(tmp_path / "shards", 4)
    with pytest.raises(DataError, match=r"shards: geometry needs at least 5 pairs, got 4"):
        evaluate(encoder, config(tmp_path), say=lambda _: None)


def test_a_diverged_model_is_refused_by_name(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 8)
    tiny_bundle(tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(BundleError, match="'tiny': the embeddings of 8 of 8 .* not finite"):
        embed_dataset(Encoder(bundle), tmp_path / "shards")


def test_means_are_those_of_the_rows_and_a_part_is_chosen_by_id(
    tmp_path: Path, encoder: Encoder
) -> None:
    manifest = write_dataset(tmp_path / "shards", 40)
    data = embed_dataset(encoder, tmp_path / "shards")
    means = modality_means(encoder, [tmp_path / "shards"], max_pairs=100)
    np.testing.assert_allclose(means.image, data.images.mean(dim=0), atol=1e-6)
    assert means.num_pairs == 40
    part = embed_dataset(encoder, tmp_path / "shards", max_pairs=7)
    rows = sorted(np.argsort(manifest.sample_ids)[:7].tolist())
    assert [s.key for s in part.samples] == [data.samples[row].key for row in rows]


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


def test_the_report_is_one_page_that_loads_nothing(tmp_path: Path, encoder: Encoder) -> None:
    write_dataset(tmp_path / "shards", 40)
    settings = config(tmp_path)
    evaluation, evidence = evaluate(encoder, settings, say=lambda _: None)
    write_report(tmp_path / "report.html", evaluation, settings, evidence)
    text = (tmp_path / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.links
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "script" not in page.tags
    assert page.tags.count("svg") == 3
    assert "url(http" not in text
    assert page.images_without_alt == 0
    assert page.tags.count("h1") == 1
    assert f"{100 * evaluation.zero_shot['t'].top1:.1f}%" in text
    assert encoder.fingerprint[:12] in text
    assert sorted(p.name for p in tmp_path.glob("*report*")) == ["report.html"]


def test_equal_evaluations_give_equal_pages(tmp_path: Path, encoder: Encoder) -> None:
    write_dataset(tmp_path / "shards", 40)
    settings = config(tmp_path)
    evaluation, evidence = evaluate(encoder, settings, say=lambda _: None)
    for name in ("first.html", "second.html"):
        write_report(tmp_path / name, evaluation, settings, evidence)
    assert (tmp_path / "first.html").read_bytes() == (tmp_path / "second.html").read_bytes()


@pytest.mark.parametrize("kind", ["zero_shot", "retrieval", "geometry"])
def test_a_report_of_one_kind_of_task_is_whole(tmp_path: Path, encoder: Encoder, kind: str) -> None:
    write_dataset(tmp_path / "shards", 40)
    tree = config(tmp_path).model_dump(mode="json")
    settings = validate_config(EvaluationConfig, {kind: tree[kind]}, source="test")
    evaluation, evidence = evaluate(encoder, settings, say=lambda _: None)
    write_report(tmp_path / "report.html", evaluation, settings, evidence)
    headings = {"zero_shot": "Zero-shot", "retrieval": "Retrieval", "geometry": "Geometry"}
    page, output = (tmp_path / "report.html").read_text(), io.StringIO()
    print_summary(evaluation, Console(file=output, width=120))
    for name, heading in headings.items():
        assert (f"<h2>{heading}" in page) == (name == kind)
    assert ("zero-shot" in output.getvalue()) == (kind == "zero_shot")
    assert ("retrieval" in output.getvalue()) == (kind == "retrieval")


def test_captions_cannot_inject_markup_into_the_report(tmp_path: Path, encoder: Encoder) -> None:
    write_dataset(tmp_path / "shards", 40)
    settings = config(tmp_path)
    evaluation, evidence = evaluate(encoder, settings, say=lambda _: None)
    for data in evidence.datasets.values():
        for index, sample in enumerate(data.samples):
            data.samples[index] = type(sample)(
                key=sample.key, image=sample.image, text="<script>x</script>",
                metadata=sample.metadata,
            )  # fmt: skip
    write_report(tmp_path / "report.html", evaluation, settings, evidence)
    assert "<script>" not in (tmp_path / "report.html").read_text()


def test_the_summary_shows_figures_beside_chance(tmp_path: Path, encoder: Encoder) -> None:
    write_dataset(tmp_path / "shards", 40)
    evaluation, _ = evaluate(encoder, config(tmp_path), say=lambda _: None)
    output = io.StringIO()
    print_summary(evaluation, Console(file=output, width=120))
    text = output.getvalue()
    assert f"{evaluation.zero_shot['t'].top1:.1%}" in text
    assert "6.25%" in text
    assert re.search(r"centroid gap \d\.\d{3}", text)


def test_the_shipped_task_file_is_valid() -> None:
    import yaml

    tree = yaml.safe_load(Path("configs/evaluate/emoji.yaml").read_text())
    found = validate_config(EvaluationConfig, tree, source="emoji")
    assert list(found.zero_shot) == ["unseen_style_seen_concepts", "unseen_style_unseen_concepts"]
    assert json.loads(found.model_dump_json())["seed"] == 0
