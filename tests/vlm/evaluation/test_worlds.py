"""Results do not depend on ranks, tiles or threads: equal bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.support import tiny_bundle, unit_rows, write_dataset
from vlm.config import validate_config
from vlm.distributed import World, gather_bytes, gather_uneven_rows
from vlm.evaluation import EvaluationConfig, evaluate, subject_of_bundle
from vlm.evaluation.exact import UNIT, exact_mean, over_rows, rank_range, whole_rows
from vlm.evaluation.ranks import best_positive_ranks, paired_ranks, top_matches
from vlm.inference import load_bundle


def figures(world: World, folder: str) -> dict[str, Any]:
    """Everything that ranks share, on one of them."""
    torch.set_num_threads(1)
    tasks = [
        {"type": "zero_shot", "data": "t", "class_field": "concept"},
        {"type": "retrieval", "data": "t", "group_field": "concept"},
        {"type": "geometry", "data": "t", "group_field": "concept"},
        {"type": "few_shot", "data": "t", "class_field": "concept", "shots": [1], "episodes": 5,
         "methods": ["prototypes", "linear_probe", "opta"]},
        {"type": "mixed_retrieval", "data": "t"},
    ]  # fmt: skip
    datasets = {"t": {"type": "shards", "location": f"{folder}/shards"}}
    tree = {"datasets": datasets, "tasks": tasks, "bootstrap": {"draws": 100}}
    config = validate_config(EvaluationConfig, tree, source="test")
    found = evaluate(subject_of_bundle(load_bundle(Path(folder) / "bundle")), config, world)
    images, texts = unit_rows(33, 8).float(), unit_rows(33, 8, seed=1).float()
    own = torch.arange(33)
    return {
        "evaluation": found.model_dump(exclude={"seconds"}),
        "paired": [r.tolist() for r in paired_ranks(images, texts, own, own, world, tile=5)],
        "ranks": best_positive_ranks(images, texts, own, own, world, tile=7).tolist(),
        "top": top_matches(images, texts, 4, world).tolist(),
        "uneven": gather_uneven_rows(torch.arange(world.rank), world).tolist(),
        "bytes": gather_bytes(b"x" * world.rank, world),
    }


@pytest.mark.distributed
def test_one_two_and_three_ranks_give_the_same_figures_to_the_last_bit(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 150)  # three chunks: the last of three ranks has a part
    tiny_bundle(tmp_path / "bundle")
    threads = torch.get_num_threads()
    alone = figures(World(), str(tmp_path))
    torch.set_num_threads(threads)
    for size in (2, 3):
        for found in run_ranks(size, figures, str(tmp_path)):
            assert found["uneven"] == [n for rank in range(size) for n in range(rank)]
            assert found["bytes"] == [b"x" * rank for rank in range(size)]
            for name in ("evaluation", "paired", "ranks", "top"):
                assert found[name] == alone[name], (size, name)


def test_products_of_whole_rows_are_the_same_in_every_order_and_close_to_the_cosine() -> None:
    images, texts = unit_rows(70, 96).float(), unit_rows(50, 96, seed=1).float()
    left, right = whole_rows(images), whole_rows(texts)
    whole = left @ right.T
    turned = torch.randperm(96)
    assert whole.equal(left[:, turned] @ right[:, turned].T)
    one = torch.stack([(left[i] * right).flip(1).sum(dim=1) for i in range(70)])
    assert whole.equal(one)
    cosines = images.double() @ texts.double().T
    assert float((whole / UNIT - cosines).abs().max()) < 6e-8


def test_rows_too_long_to_be_exact_are_refused() -> None:
    with pytest.raises(ValueError, match="length 1 or less"):
        whole_rows(torch.full((1, 4), 1.0))


@pytest.mark.parametrize("tile", [1, 3, 16, 100])
def test_both_directions_at_once_are_each_by_itself_whatever_the_tile(tile: int) -> None:
    generator = torch.Generator().manual_seed(3)
    # Few values, so plenty of ties; two to three captions an image.
    images = torch.randint(-1, 2, (9, 3), generator=generator).float() / 2
    texts = torch.randint(-1, 2, (22, 3), generator=generator).float() / 2
    groups, text_groups = torch.arange(9), torch.arange(22) % 9
    both = paired_ranks(images, texts, groups, text_groups, tile=tile)
    assert both[0].equal(best_positive_ranks(images, texts, groups, text_groups))
    assert both[1].equal(best_positive_ranks(texts, images, text_groups, groups))


def test_every_chunk_has_one_rank_and_a_mean_does_not_know_its_order() -> None:
    for count, size in ((10, 3), (2, 3), (0, 2), (7, 1)):
        starts = [
            start
            for rank in range(size)
            for start in rank_range(count, World(rank=rank, size=size), at_once=2)
        ]
        assert starts == list(range(0, count, 2))
    squares = over_rows(5, World(), lambda start, stop: torch.arange(start, stop) ** 2, at_once=2)
    assert squares.tolist() == [0, 1, 4, 9, 16]
    values = [1e16, 1.0, -1e16, 1.0]
    assert exact_mean(values) == exact_mean(sorted(values)) == 0.5
    with pytest.raises(ValueError, match="no values"):
        exact_mean([])
