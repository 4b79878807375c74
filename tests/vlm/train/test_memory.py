"""What loss terms remember: by sample, alike on any number of ranks, through checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tests.distributed import run_ranks
from vlm.distributed import World
from vlm.errors import CheckpointError
from vlm.losses import LossTerm
from vlm.train.memory import LossMemory
from vlm.types import Memory

IDS = np.array([-(2**62), -5, 3, 4, 8, 11, 2**62], dtype=np.int64)
NAMES = ("sogclr/log_image", "sogclr/log_text")


def terms(*kinds: str) -> list[LossTerm]:
    return TypeAdapter(list[LossTerm]).validate_python([{"type": kind} for kind in kinds])


def memory(world: World | None = None, *kinds: str) -> LossMemory:
    return LossMemory(terms(*(kinds or ("sogclr",))), IDS, world or World())


def values(*numbers: float, **run: float) -> Memory:
    rows = torch.tensor(numbers)
    return Memory(
        samples={NAMES[0]: rows, NAMES[1]: -rows},
        run={name: torch.tensor(value) for name, value in run.items()},
    )


def ids(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def test_a_sample_that_was_never_seen_has_the_value_it_starts_with() -> None:
    found = memory(World(), "isogclr").recall(ids(3, -5)).samples
    assert found["isogclr/log_image"].tolist() == [-torch.inf, -torch.inf]
    assert_close(found["isogclr/temperature_text"], torch.full((2,), 0.01))


def test_what_was_kept_of_a_sample_is_recalled_in_any_order() -> None:
    kept = memory()
    kept.keep(ids(3, -5, 2**62), values(1.0, 2.0, 3.0, gap=0.5))
    found = kept.recall(ids(2**62, 4, 3))
    assert found.samples[NAMES[0]].tolist() == [3.0, -torch.inf, 1.0]
    assert found.samples[NAMES[1]].tolist() == [-3.0, -torch.inf, -1.0]
    assert found.run["gap"].item() == 0.5


def test_of_a_sample_that_comes_twice_the_last_row_is_kept() -> None:
    kept = memory()
    kept.keep(ids(4, 3, 4, 4, 3), values(1.0, 2.0, 3.0, 4.0, 5.0))
    assert kept.recall(ids(4, 3)).samples[NAMES[0]].tolist() == [4.0, 5.0]


def test_a_sample_of_other_data_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 5 is not one of the run's"):
        memory().recall(ids(3, 5))


def test_a_loss_without_memory_keeps_nothing(tmp_path: Path) -> None:
    plain = memory(World(), "clip")
    plain.keep(ids(99), Memory())
    assert plain.recall(ids(99)) == Memory()
    assert plain.state() == {}
    plain.load(tmp_path)


def save(kept: LossMemory, folder: Path, rank: int = 0) -> None:
    """As a checkpoint does."""
    if state := kept.state():
        save_file(state, folder / f"memory-{rank:05d}.safetensors")


def on_ranks(world: World, folder: Path) -> tuple[Any, Any]:
    kept = memory(world)
    kept.keep(ids(8, 3, -5, 3), values(1.0, 2.0, 3.0, 4.0, gap=0.25))
    save(kept, folder, world.rank)
    found = kept.recall(ids(3, 8, -5, 11))
    return found.samples, found.run


@pytest.mark.distributed
def test_ranks_remember_together_what_one_process_does_and_hand_it_on(
    tmp_path: Path,
) -> None:
    expected = on_ranks(World(), tmp_path)
    together = tmp_path / "together"
    together.mkdir()
    for samples, run in run_ranks(4, on_ranks, together):
        assert {n: v.tolist() for n, v in samples.items()} == {
            n: v.tolist() for n, v in expected[0].items()
        }
        assert run == expected[1]
    parts = [load_file(path)["sample_ids"] for path in sorted(together.iterdir())]
    assert sorted(torch.cat(parts).tolist()) == IDS.tolist()
    for loaded in (memory(), memory(World(rank=0, size=1))):
        loaded.load(together)
        found = loaded.recall(ids(3, 8, -5, 11))
        assert {n: v.tolist() for n, v in found.samples.items()} == {
            n: v.tolist() for n, v in expected[0].items()
        }
        assert found.run["gap"].item() == 0.25


def test_a_checkpoint_without_the_memory_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="remembers nothing of sogclr/log_image"):
        memory().load(tmp_path)
    save(memory(World(), "fastclip_v3"), tmp_path)
    with pytest.raises(CheckpointError, match="remembers nothing of sogclr/log_image"):
        memory().load(tmp_path)


def test_a_memory_of_other_samples_is_refused(tmp_path: Path) -> None:
    save(LossMemory(terms("sogclr"), IDS[:-1], World()), tmp_path)
    with pytest.raises(CheckpointError, match="of other samples"):
        memory().load(tmp_path)


def test_a_damaged_memory_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "memory-00000.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="memory-00000.safetensors: damaged"):
        memory().load(tmp_path)
