"""What loss terms remember: numbers for every sample of the data, and a few for the run.

Each rank keeps the samples whose id, modulo the number of ranks, is its own, in main memory. For a
step, every rank fills in those that it keeps and the sum over ranks is what all of them see. All
ranks compute the same new values, and each writes down its own: any number of ranks remembers the
same, and a checkpoint of any number of ranks can be read by any other number.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vlm.distributed import World, sum_over_ranks
from vlm.errors import CheckpointError
from vlm.losses import LossTerm, initial_sample_values
from vlm.types import Memory

__all__ = ["LossMemory"]

_IDS = "sample_ids"
_RUN = "run:"


class LossMemory:
    """The memory of a run's loss terms, this rank's part of it.

    Args:
        terms: The loss, as configured.
        sample_ids: Of all samples of the run; not looked at if no term remembers samples.
        world: The ranks.
    """

    def __init__(
        self,
        terms: Sequence[LossTerm],
        sample_ids: Int64[np.ndarray, " sample"],
        world: World,
    ) -> None:
        self._world = world
        initial = initial_sample_values(terms)
        every = np.unique(sample_ids) if initial else np.empty(0, np.int64)
        self._ids = torch.from_numpy(every[every % world.size == world.rank])  # sorted
        self._samples = {
            name: torch.full((len(self._ids),), value, dtype=torch.float32)
            for name, value in sorted(initial.items())
        }
        self._run: dict[str, Tensor] = {}

    def recall(self, sample_ids: Int64[Tensor, " global_batch"]) -> Memory:
        """What is remembered of these samples and of the run; every rank calls it.

        Raises:
            ValueError: If an id is not among those of the run.
        """
        run = {name: value.to(sample_ids.device) for name, value in self._run.items()}
        if not self._samples:
            return Memory(run=run)
        places, own = self._places(sample_ids)
        rows = torch.zeros(len(self._samples) + 1, len(sample_ids))
        for row, values in zip(rows, self._samples.values(), strict=False):
            row[own] = values[places[own]]
        rows[-1] = own
        rows = sum_over_ranks(rows.to(sample_ids.device), self._world)
        if not bool((rows[-1] == 1).all()):
            unknown = int(sample_ids[rows[-1] != 1][0])
            message = f"sample {unknown} is not one of the run's, so nothing is remembered of it"
            raise ValueError(message)
        return Memory(samples=dict(zip(self._samples, rows, strict=False)), run=run)

    def keep(self, sample_ids: Int64[Tensor, " global_batch"], memory: Memory) -> None:
        """Write down what a step left; of a sample that comes twice, its last row."""
        self._run = {name: value.detach().cpu() for name, value in memory.run.items()}
        if not self._samples:
            return
        places, own = self._places(sample_ids)
        chosen = _last_of_each(sample_ids.cpu())
        chosen = chosen[own[chosen]]
        for name, values in self._samples.items():
            values[places[chosen]] = memory.samples[name].detach().cpu()[chosen].to(values.dtype)

    def limit(self, name: str, value: float) -> None:
        """Let a number of the run be at most this from now on; it is the same on every rank."""
        found = self._run.get(name)
        limit = torch.tensor(value, dtype=torch.float32)
        self._run[name] = limit if found is None else found.clamp(max=limit)

    def state(self) -> dict[str, Tensor]:
        """This rank's part, for a checkpoint; the very tensors that the next step changes."""
        tensors = {_RUN + name: value.reshape(1) for name, value in self._run.items()}
        if self._samples:
            tensors |= {_IDS: self._ids, **self._samples}
        return tensors

    def load(self, folder: Path) -> None:
        """Read this rank's part from the parts of all ranks that wrote the checkpoint.

        Raises:
            CheckpointError: If a part is damaged, or what the loss remembers is not in them.
        """
        found = [_read(path) for path in sorted(folder.glob("memory-*.safetensors"))]
        for part in found[:1]:
            self._run = {
                name.removeprefix(_RUN): value[0]
                for name, value in part.items()
                if name.startswith(_RUN)
            }
        if not self._samples:
            return
        missing = [name for name in self._samples if not all(name in part for part in found)]
        if missing or not found:
            message = (
                f"{folder}: remembers nothing of {', '.join(missing or self._samples)}, which "
                f"`loss` needs; restore the loss of the run, or start one under another name"
            )
            raise CheckpointError(message)
        ids = torch.cat([part[_IDS] for part in found])
        order = ids.argsort()
        places = torch.searchsorted(ids[order], self._ids).clamp(max=max(len(ids) - 1, 0))
        if len(self._ids) and not torch.equal(ids[order][places], self._ids):
            message = f"{folder}: what it remembers is of other samples; remove this checkpoint"
            raise CheckpointError(message)
        for name, values in self._samples.items():
            values.copy_(torch.cat([part[name] for part in found])[order][places])

    def _places(
        self, sample_ids: Int64[Tensor, " global_batch"]
    ) -> tuple[Int64[Tensor, " global_batch"], Tensor]:
        """Where each sample is kept, and whether it is this rank that keeps it."""
        wanted = sample_ids.cpu()
        if not len(self._ids):
            return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
        places = torch.searchsorted(self._ids, wanted).clamp(max=len(self._ids) - 1)
        return places, self._ids[places] == wanted


def _last_of_each(ids: Int64[Tensor, " row"]) -> Int64[Tensor, " some"]:
    """The last row of each id, so that writing does not depend on the order of a device."""
    order = ids.argsort(stable=True)
    ordered = ids[order]
    last = torch.ones(len(ids), dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return order[last]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        message = f"{path}: damaged ({error}); remove {path.parent} to resume from an older one"
        raise CheckpointError(message) from error
