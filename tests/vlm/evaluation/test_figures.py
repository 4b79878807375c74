import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.support import unit_rows
from vlm.evaluation import recall
from vlm.evaluation import zero_shot_accuracy as zero_shot_outcome
from vlm.evaluation.ranks import best_positive_ranks, top_matches
from vlm.evaluation.tasks import GeometryResult, ZeroShotResult
from vlm.evaluation.tasks import measure_geometry as geometry_outcome


def zero_shot_accuracy(
    images: torch.Tensor, classes: torch.Tensor, labels: torch.Tensor
) -> ZeroShotResult:
    return zero_shot_outcome(images, classes, labels).result


def measure_geometry(
    images: torch.Tensor,
    texts: torch.Tensor,
    generator: torch.Generator,
    *,
    groups: torch.Tensor | None = None,
) -> GeometryResult:
    return geometry_outcome(images, texts, generator, groups=groups).result


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brute_force(
    queries: torch.Tensor, gallery: torch.Tensor, qg: list[int], gg: list[int]
) -> list[int]:
    ranks = []
    for q, group in zip(queries, qg, strict=True):
        order = sorted(range(len(gallery)), key=lambda j: (-float(gallery[j] @ q), j))
        ranks.append(next(r for r, j in enumerate(order) if gg[j] == group))
    return ranks


@given(seed=st.integers(0, 500), tile=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_ranks_equal_a_full_sort_whatever_the_tile(seed: int, tile: int) -> None:
    generator = seeded(seed)
    # Few distinct values: plenty of ties.
    queries = torch.randint(-1, 2, (7, 3), generator=generator).float() / 2
    gallery = torch.randint(-1, 2, (9, 3), generator=generator).float() / 2
    groups = torch.cat([torch.arange(4), torch.randint(0, 4, (5,), generator=generator)])
    query_groups = torch.randint(0, 4, (7,), generator=generator)
    found = best_positive_ranks(queries, gallery, query_groups, groups, tile=tile)
    assert found.tolist() == brute_force(queries, gallery, query_groups.tolist(), groups.tolist())


def test_a_query_without_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 queries have no positive"):
        best_positive_ranks(torch.eye(2), torch.eye(2), torch.tensor([0, 5]), torch.tensor([0, 1]))


def test_zero_shot_on_a_matrix_made_by_hand() -> None:
    classes = torch.eye(12)
    images = torch.zeros(4, 12)
    images[0, 0] = 1.0  # class 0: right at once
    images[1, 0], images[1, 1] = 0.9, 0.8  # class 1: second
    images[2] = torch.linspace(1, 0, 12)  # class 6: seventh
    images[3] = torch.linspace(1, 0, 12)  # class 11: last
    result = zero_shot_accuracy(images / 4, classes, torch.tensor([0, 1, 6, 11]))
    assert (result.top1, result.top5, result.top10) == (0.25, 0.5, 0.75)
    assert result.mean_per_class == 0.25
    assert (result.classes, result.samples, result.chance) == (12, 4, 1 / 12)


def test_mean_per_class_weighs_rare_classes_alike() -> None:
    images = torch.eye(2)[[0, 0, 0, 0]]
    result = zero_shot_accuracy(images, torch.eye(2), torch.tensor([0, 0, 0, 1]))
    assert (result.top1, result.mean_per_class) == (0.75, 0.5)


def test_a_tie_goes_to_the_lower_class() -> None:
    flat = torch.full((2, 3), 0.5)
    result = zero_shot_accuracy(flat, torch.full((3, 3), 0.5), torch.tensor([0, 2]))
    assert result.top1 == 0.5


def test_random_embeddings_are_at_chance() -> None:
    images, classes = unit_rows(4000, 32).float(), unit_rows(20, 32, seed=1).float()
    labels = torch.randint(0, 20, (4000,), generator=seeded())
    result = zero_shot_accuracy(images, classes, labels)
    deviation = math.sqrt(0.05 * 0.95 / 4000)
    assert abs(result.top1 - 0.05) < 4 * deviation


def test_recall_counts_a_query_once_if_any_positive_is_near() -> None:
    # Two images of three captions each; CLIP_benchmark's definition.
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.1, 0.9], [0.2, 0.8], [0.95, 0.0], [0.0, 0.7]])
    text_groups, image_groups = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1])
    found = recall(images, texts, image_groups, text_groups)
    # Image 0 meets caption 4 (of the other) first, image 1 caption 2 (of the other).
    assert (found.recall1, found.recall5, found.median_rank, found.mrr) == (0.0, 1.0, 2.0, 0.5)
    assert found.chance == 0.5
    found = recall(texts, images, text_groups, image_groups)
    assert found.recall1 == pytest.approx(4 / 6)


def test_top_matches_are_best_first_and_ties_by_index() -> None:
    gallery = torch.tensor([[0.5], [1.0], [0.5], [1.0]])
    assert top_matches(torch.ones(1, 1), gallery, 3).tolist() == [[1, 3, 0]]


def test_top_matches_do_not_depend_on_how_the_queries_are_cut() -> None:
    queries, gallery = unit_rows(600, 6).float(), unit_rows(40, 6, seed=1).float()
    whole = (queries.double() @ gallery.double().T).argsort(dim=1, descending=True)[:, :3]
    assert top_matches(queries, gallery, 3).equal(whole)


def test_the_median_of_an_even_count_lies_between_the_middle_ranks() -> None:
    queries, groups = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.arange(2)
    assert recall(queries, torch.eye(2), groups, groups).median_rank == 1.5
    queries, groups = torch.eye(3)[[0, 0, 0]], torch.arange(3)
    assert recall(queries, torch.eye(3), groups, groups).median_rank == 2.0


def test_nothing_to_measure_is_told() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        zero_shot_accuracy(torch.empty(0, 3), torch.eye(3), torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one query"):
        recall(torch.empty(0, 3), torch.eye(3), torch.empty(0, dtype=torch.int64), torch.arange(3))
    with pytest.raises(ValueError, match="at least 5 pairs, got 4"):
        measure_geometry(unit_rows(4, 3).float(), unit_rows(4, 3).float(), seeded())


def test_identical_modalities_have_no_gap() -> None:
    rows = unit_rows(400, 16).float()
    found = measure_geometry(rows, rows, seeded())
    assert found.centroid_gap == 0
    # Rows of fp32 are unit to 1e-7, whose root must not show as a distance.
    assert found.pair_distance == pytest.approx(0, abs=1e-6)
    assert found.alignment == pytest.approx(0, abs=1e-12)
    assert found.relative_gap == pytest.approx(0, abs=1e-6)
    assert found.linear_separability == pytest.approx(0.5, abs=0.1)


def test_two_cones_are_told_apart_and_their_gap_is_measured() -> None:
    image = torch.nn.functional.normalize(unit_rows(300, 16) * 0.1 + torch.eye(16)[0], dim=1)
    text = torch.nn.functional.normalize(unit_rows(300, 16, seed=1) * 0.1 - torch.eye(16)[0], dim=1)
    found = measure_geometry(image.float(), text.float(), seeded())
    assert found.linear_separability == 1.0
    assert found.centroid_gap == pytest.approx(1.99, abs=0.02)
    assert found.relative_gap > 0.98


def test_figures_equal_their_direct_forms() -> None:
    image, text = unit_rows(60, 8), unit_rows(60, 8, seed=1)
    found = measure_geometry(image.float(), text.float(), seeded())
    image, text = image.float().double(), text.float().double()
    off = ~torch.eye(60, dtype=torch.bool)

    def potential(a: torch.Tensor, b: torch.Tensor) -> float:
        squared = (a[:, None] - b[None]).square().sum(-1)
        return float(torch.log(torch.exp(-2 * squared)[off].mean()))

    assert found.image_uniformity == pytest.approx(potential(image, image), abs=1e-6)
    assert found.text_uniformity == pytest.approx(potential(text, text), abs=1e-6)
    assert found.cross_uniformity == pytest.approx(potential(image, text), abs=1e-6)
    assert found.alignment == pytest.approx(float((image - text).square().sum(1).mean()), abs=1e-6)
    assert found.pair_distance == pytest.approx(float((image - text).norm(dim=1).mean()), abs=1e-6)
    within = [float(((1 - z @ z.T) / 2)[off].mean()) for z in (image, text)]
    matched = float(((1 - (image * text).sum(1)) / 2).mean())
    assert found.relative_gap == pytest.approx(matched / (matched + sum(within) / 2), abs=1e-6)
    nearest = (text @ image.T).argsort(dim=1, descending=True)[:, :10]
    counts = torch.bincount(nearest.flatten(), minlength=60).double()
    z = (counts - counts.mean()) / counts.std(unbiased=False)
    assert found.hubness_skew == pytest.approx(float((z**3).mean()), abs=1e-6)


def test_rows_of_one_group_are_no_strangers_to_each_other() -> None:
    image, text = unit_rows(60, 8), unit_rows(60, 8, seed=1)
    groups = torch.randint(0, 12, (60,), generator=seeded())
    found = measure_geometry(image.float(), text.float(), seeded(), groups=groups)
    image, text = image.float().double(), text.float().double()
    strangers = groups[:, None] != groups[None]
    within = [float(((1 - z @ z.T) / 2)[strangers].mean()) for z in (image, text)]
    matched = float(((1 - (image * text).sum(1)) / 2).mean())
    assert found.relative_gap == pytest.approx(matched / (matched + sum(within) / 2), abs=1e-6)
    squared = (image[:, None] - text[None]).square().sum(-1)
    cross = float(torch.log(torch.exp(-2 * squared)[strangers].mean()))
    assert found.cross_uniformity == pytest.approx(cross, abs=1e-6)
    alone = measure_geometry(image.float(), text.float(), seeded())
    assert found.image_uniformity == alone.image_uniformity
    numbered = measure_geometry(image.float(), text.float(), seeded(), groups=torch.arange(60))
    unlike = {"tolerance", "joint_v_measure"}  # which need groups
    assert numbered.model_dump(exclude=unlike) == alone.model_dump(exclude=unlike)


def test_pairs_of_one_single_group_are_refused() -> None:
    rows = unit_rows(6, 4).float()
    with pytest.raises(ValueError, match="at least 2 groups, all 6 pairs are of one"):
        measure_geometry(rows, rows, seeded(), groups=torch.zeros(6, dtype=torch.int64))


def test_an_even_spread_reaches_the_floor_and_full_rank() -> None:
    rows = unit_rows(5000, 32).float()
    found = measure_geometry(rows, unit_rows(5000, 32, seed=1).float(), seeded())
    assert found.uniformity_floor == -4 + 8 / 32
    assert found.image_uniformity == pytest.approx(found.uniformity_floor, abs=0.01)
    assert found.image_effective_rank == pytest.approx(32, rel=0.01)
    assert found.image_w2_uniformity == pytest.approx(0, abs=0.1)


def test_collapse_shows_in_rank_and_w2_alone() -> None:
    flat = torch.cat(
        [unit_rows(2000, 4), torch.zeros(2000, 28, dtype=torch.float64)], dim=1
    ).float()
    found = measure_geometry(flat, flat, seeded())
    assert found.image_effective_rank == pytest.approx(4, rel=0.01)
    assert found.image_w2_uniformity < -0.8


def test_geometry_is_blind_to_rotation() -> None:
    image, text = unit_rows(80, 8), unit_rows(80, 8, seed=1)
    rotation, _ = torch.linalg.qr(unit_rows(8, 8, seed=2))
    plain = measure_geometry(image.float(), text.float(), seeded()).model_dump()
    turned = measure_geometry(
        (image @ rotation).float(), (text @ rotation).float(), seeded()
    ).model_dump()
    for name, value in plain.items():
        if isinstance(value, float):
            assert_close(turned[name], value, rtol=1e-3, atol=2e-3, msg=name)
