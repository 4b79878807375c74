"""Tensors of a checkpoint, in one safetensors file for each rank and kind.

    model-00000.safetensors      what rank 0 held: whole tensors, or parts of them
    model-00001.safetensors      what rank 1 held

A file's own header says where each part belongs in the whole, so any number of ranks can read what
any other number has written, each only the bytes it needs.

Not torch's own distributed checkpoints: their index is a pickle, which loading runs.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.distributed import Piece, World, is_sharded, piece_of
from vlm.errors import CheckpointError

__all__ = ["ShardReader", "own_pieces", "snapshot", "write_shard"]

_LAYOUT: Final = "layout"


def own_pieces(tensors: Mapping[str, Tensor], world: World) -> dict[str, Piece]:
    """What this rank is to write: its parts of sharded tensors, and its share of the others.

    Tensors that all ranks hold are spread over them by size, so that all write at the same time.
    """
    load = [0] * world.size
    own = {}
    for name, tensor in tensors.items():
        piece = piece_of(tensor)
        if is_sharded(tensor):
            own[name] = piece
            continue
        rank = load.index(min(load))
        load[rank] += max(1, tensor.numel() * tensor.element_size())
        if rank == world.rank:
            own[name] = piece
    return own


def snapshot(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """Copies in main memory, which do not change while training goes on."""
    return {
        name: Piece(
            local=piece.local.detach().to("cpu", copy=True).contiguous(),
            first=piece.first,
            shape=piece.shape,
        )
        for name, piece in pieces.items()
    }


def write_shard(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Write this rank's file of one kind; parts without elements are left out."""
    held = {name: piece for name, piece in pieces.items() if piece.local.numel()}
    layout = {name: [piece.first, piece.shape] for name, piece in held.items()}
    tensors = {name: piece.local for name, piece in held.items()}
    save_file(tensors, path, metadata={_LAYOUT: json.dumps(layout)})


class ShardReader:
    """Reads tensors of one kind from the files of all ranks that wrote a checkpoint.

    Args:
        folder: Of the checkpoint.
        kind: `model`, `ema`, `optimizer`.

    Raises:
        CheckpointError: If a file is damaged.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder = folder
        self._kind = kind
        self._files: dict[Path, Any] = {}
        self._parts: dict[str, list[tuple[Path, tuple[int, ...]]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of every tensor there is."""
        for path in sorted(folder.glob(f"{kind}-*.safetensors")):
            for name, (first, shape) in self._layout(path).items():
                self._parts.setdefault(name, []).append((path, tuple(first)))
                self.shapes[name] = tuple(shape)

    def fill(self, name: str, tensor: Tensor) -> None:
        """Copy what is kept into a tensor of the same shape, or this rank's part of it.

        Raises:
            CheckpointError: If it is not there, of another shape, or damaged.
        """
        piece = piece_of(tensor)
        if self.shapes.get(name) != piece.shape:
            found = self.shapes.get(name, "nothing")
            message = (
                f"{self._folder}: {self._kind} tensor {name} should be {piece.shape}, found {found}"
            )
            raise CheckpointError(message)
        with torch.no_grad():
            piece.local.copy_(self._read(name, piece.first, tuple(piece.local.shape)))

    def whole(self, name: str) -> Tensor:
        """A tensor as it is kept, all of it.

        Raises:
            CheckpointError: If it is damaged.
        """
        shape = self.shapes[name]
        return self._read(name, (0,) * len(shape), shape)

    def _read(self, name: str, first: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The box that begins at `first`, put together from all parts that reach into it."""
        if 0 in shape:
            return torch.empty(shape)
        box: Tensor | None = None
        found = 0
        for path, begin in self._parts[name]:
            try:
                part = _overlap(self._files[path], name, begin, first, shape)
            except (OSError, SafetensorError) as error:
                raise _damaged(path, error) from error
            if part is None:
                continue
            values, target = part
            if box is None:
                box = torch.empty(shape, dtype=values.dtype)
            box[target] = values
            found += values.numel()
        if box is None or found != box.numel():
            message = f"{self._folder}: parts of {self._kind} tensor {name} are missing"
            raise CheckpointError(message)
        return box

    def _layout(self, path: Path) -> dict[str, Any]:
        try:
            self._files[path] = safe_open(path, framework="pt")
            return dict(json.loads((self._files[path].metadata() or {})[_LAYOUT]))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged ({error}); remove {path.parent} to use an older checkpoint"
    )


def _overlap(
    file: Any, name: str, begin: tuple[int, ...], first: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[Tensor, tuple[slice, ...]] | None:
    """The part of a file's tensor inside a box, and its place there; none if they do not meet."""
    stored = file.get_slice(name)
    inside, target = [], []
    for start, length, wanted, width in zip(begin, stored.get_shape(), first, shape, strict=True):
        low, high = max(start, wanted), min(start + length, wanted + width)
        if low >= high:
            return None
        inside.append(slice(low - start, high - start))
        target.append(slice(low - wanted, high - wanted))
    values = stored[tuple(inside)] if inside else file.get_tensor(name)
    return values, tuple(target)
