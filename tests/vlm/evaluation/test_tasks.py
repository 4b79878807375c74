"""Kinds of tasks on embeddings chosen by hand."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from tests.support import unit_rows
from tests.vlm.evaluation.fakes import context, embedded, fake_subject
from vlm.errors import BundleError, DataError
from vlm.evaluation.probes import aligned_prototypes, standardised
from vlm.evaluation.tasks import (
    ArithmeticTask,
    CaptioningTask,
    CorrectedTask,
    FewShotTask,
    GeometryTask,
    MixedTask,
    ZeroShotTask,
)
from vlm.evaluation.tasks.arithmetic import word_changes
from vlm.evaluation.tasks.few_shot import Method
from vlm.inference import ModalityMeans

METHODS: list[Method] = ["prototypes", "linear_probe", "opta"]


def clusters(
    ways: int, each: int, *, noise: float, seed: int = 0
) -> tuple[torch.Tensor, list[dict[str, str]]]:
    labels = torch.arange(ways).repeat_interleave(each)
    centres = unit_rows(ways, 16, seed=9)
    rows = F.normalize(centres[labels] + noise * unit_rows(len(labels), 16, seed=seed), dim=1)
    return rows, [{"class": f"c{label}"} for label in labels.tolist()]


def test_few_shot_finds_what_is_apart_and_is_at_chance_where_nothing_is() -> None:
    rows, metadata = clusters(6, 5, noise=0.2)
    data = embedded(rows, ["x"] * 30, metadata=metadata)
    task = FewShotTask(
        data="d", class_field="class", shots=[1, 3], ways=4, queries=2, episodes=3, methods=METHODS
    )
    found = task.measure(context(d=data)).result
    assert (found.ways, found.queries, found.eligible_classes, found.chance) == (4, 8, 6, 0.25)
    assert [(f.shots, f.method) for f in found.figures] == [(s, m) for s in (1, 3) for m in METHODS]
    assert all(figure.accuracy == 1 for figure in found.figures)
    shuffled = [metadata[i] for i in torch.randperm(30).tolist()]
    blind = embedded(unit_rows(30, 16), ["x"] * 30, metadata=shuffled)
    for figure in task.measure(context(d=blind)).result.figures:
        assert figure.accuracy == pytest.approx(0.25, abs=0.26)


def test_examples_may_come_from_another_dataset_and_too_few_are_told() -> None:
    rows, metadata = clusters(4, 1, noise=0.1, seed=1)
    support, known = clusters(5, 2, noise=0.1)
    data = embedded(rows, ["x"] * 4, metadata=metadata)
    other = embedded(support, ["x"] * 10, metadata=known)
    task = FewShotTask(data="d", support="s", class_field="class", shots=[2], episodes=2)
    found = task.measure(context(d=data, s=other)).result
    assert (found.ways, [f.accuracy for f in found.figures]) == (4, [1.0, 1.0])
    alone = FewShotTask(data="d", class_field="class", shots=[1])
    with pytest.raises(DataError, match="0 of 4 classes have the 1 examples and 1 queries"):
        alone.measure(context(d=data))


def test_prompts_that_do_not_name_the_class_are_refused() -> None:
    """Bug: they were taken as they were, and every class got the same row."""
    for prompts, wrong in ((["{}", "a photo"], "'a photo' is the same for every"), ([], "is none")):
        with pytest.raises(ValidationError, match=f"{wrong}.*write {{}} where the name"):
            ZeroShotTask(data="d", prompts=prompts)
    assert ZeroShotTask(data="d", prompts=["{tags}"]).prompts == ["{tags}"]


def test_transport_moves_a_prototype_that_is_off_to_the_queries_of_its_class() -> None:
    centres = standardised(unit_rows(3, 16))
    queries = standardised(centres.repeat_interleave(5, dim=0) + 0.1 * unit_rows(15, 16, seed=1))
    off = standardised(centres + unit_rows(3, 16, seed=2) * 3)
    moved = aligned_prototypes(off, queries, shots=1)
    before, after = ((x - centres).norm(dim=1) for x in (off, moved))
    assert bool((after < 0.5 * before).all())
    once = aligned_prototypes(off, queries, shots=5)
    assert bool(((once - centres).norm(dim=1) < before).all())


def gapped(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs that match but for a gap along one direction."""
    rows = torch.cat([unit_rows(count, 12), torch.zeros(count, 1).double()], dim=1)
    gap = torch.zeros(13).double()
    gap[-1] = 1.5
    return F.normalize(rows + gap, dim=1), F.normalize(rows - gap, dim=1)


def test_a_gap_hides_the_other_modality_and_centring_brings_it_back() -> None:
    images, texts = gapped(60)
    data = embedded(images, [f"t{i}" for i in range(60)], texts)
    outcome = MixedTask(data="d").measure(context(d=data))
    found = outcome.result
    assert found.ndcg10 < 0.05
    assert found.ndcg10_centred > 0.95
    assert found.gain == pytest.approx(found.ndcg10_centred - found.ndcg10)
    assert found.other_modality == 0
    assert abs(found.other_modality_centred - found.other_modality_even) < 0.15
    assert (found.means, found.gallery) == ("dataset", 60)
    means = ModalityMeans(
        image=images.mean(dim=0).tolist(), text=texts.mean(dim=0).tolist(), num_pairs=60
    )
    known = MixedTask(data="d").measure(context(fake_subject(means=means), d=data)).result
    assert known.means == "bundle"
    assert known.ndcg10_centred == pytest.approx(found.ndcg10_centred, abs=0.02)


def test_an_image_near_to_every_caption_comes_first_until_hubs_count_less() -> None:
    rows, shared = unit_rows(60, 12), torch.zeros(60, 13).double()
    shared[:, -1] = 1.5
    rows = torch.cat([rows, torch.zeros(60, 1).double()], dim=1)
    images, texts = rows.clone(), F.normalize(rows + shared, dim=1)
    images[0] = shared[0]
    task = CorrectedTask(data="d", bank=20)
    result = task.measure(context(d=embedded(images, [f"t{i}" for i in range(60)], texts))).result
    assert (result.bank, result.queries, result.gallery) == (20, 40, 60)
    assert result.recall1 < 0.05
    assert result.ndcg10_without_hubs > result.recall1_without_hubs > 0.9
    assert result.recall1_centred > 0.9
    assert result.gain_without_hubs == pytest.approx(result.ndcg10_without_hubs - result.ndcg10)
    alone = CorrectedTask(data="d").measure(context(d=embedded(images[1:2], ["t"], texts[1:2])))
    assert (alone.result.bank, alone.result.recall1_without_hubs) == (0, 1)


def test_a_change_in_words_moves_an_image_to_the_changed_one() -> None:
    nouns, colours = unit_rows(4, 16), unit_rows(2, 16, seed=3)
    captions = [f"A {colour} {n}" for colour in ("red", "blue") for n in "abcd"]
    rows = torch.cat([nouns + colours[0], nouns + colours[1]])
    told = {"red": colours[0], "blue": colours[1], "re": colours[0], "x": colours[1]}
    subject = fake_subject(texts=told)
    data = embedded(rows, captions)
    task = ArithmeticTask(data="d", changes=[("red", "blue"), ("blue", "red"), ("re", "x")])
    assert word_changes(data, task.changes)[0] == (0, 4, 0)
    found = task.measure(context(subject, d=data)).result
    assert (found.queries, found.gallery) == (8, 7)
    assert found.recall1 == 1.0
    assert found.image_alone1 < 1.0
    none = ArithmeticTask(data="d", changes=[("green", "blue")])
    with pytest.raises(DataError, match="no two captions differ by one of the changes green → bl"):
        none.measure(context(subject, d=data))


def test_captions_are_written_by_the_model_and_scored() -> None:
    told: list[str | tuple[str, ...]] = [
        ("a red circle", "red disc"),
        "a blue square",
        "a green tree",
    ]
    data = embedded(unit_rows(3, 4), told)
    writer = fake_subject(captions=["a red circle", "a blue square", "nothing"])
    found = CaptioningTask(data="d").measure(context(writer, d=data)).result
    assert found.exact_fraction == pytest.approx(2 / 3)
    assert (found.best[0].written, found.worst[0].key) == ("a blue square", "s2")
    assert found.worst[0].cider == 0
    assert 0 < found.cider <= 10
    two = CaptioningTask(data="d", max_images=2).measure(context(writer, d=data)).result
    assert (two.images, two.exact_fraction, two.bleu1) == (2, 1.0, 1.0)
    with pytest.raises(BundleError, match="'fake' writes no captions; leave the captioning tasks"):
        CaptioningTask(data="d").measure(context(d=data))


def test_groups_tell_tolerance_and_joint_clusters() -> None:
    rows, metadata = clusters(4, 5, noise=0.3)
    data = embedded(rows, ["x"] * 20, rows, metadata)
    found = GeometryTask(data="d", group_field="class").measure(context(d=data)).result
    same = torch.arange(20) // 5
    pairs = (same[:, None] == same) & ~torch.eye(20, dtype=torch.bool)
    unit = data.images.double()
    assert found.tolerance == pytest.approx(float((unit @ unit.T)[pairs].mean()), abs=1e-6)
    assert found.joint_v_measure == pytest.approx(1.0)
    alone = GeometryTask(data="d").measure(context(d=data)).result
    assert alone.tolerance is alone.joint_v_measure is None
    floor = found.image_uniformity - found.image_uniformity_above_floor
    assert floor == pytest.approx(-4 + 8 / 16)
