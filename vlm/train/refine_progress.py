"""How far a refinement has come, in one file beside the bundle that it will become."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vlm.errors import CheckpointError
from vlm.files import open_whole

__all__ = ["Progress"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The file of weights, of the optimizer's state and of the number of steps done."""

    path: Path
    facts: dict[str, Any]
    """What decides the result; progress with other facts belongs to other work."""

    @staticmethod
    def beside(folder: Path, facts: dict[str, Any]) -> "Progress":
        """The progress towards a bundle in `folder`."""
        name = f".{folder.name}.refining.safetensors"
        return Progress(path=folder.with_name(name), facts=facts)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Replace the file in one move."""
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open_whole(self.path) as file:
            file.write(save(whole, {"step": str(step), "facts": json.dumps(self.facts)}))

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Put the saved state in place.

        Returns:
            Steps done; 0 where nothing is saved.

        Raises:
            CheckpointError: If the file is damaged, or belongs to other work.
        """
        if not self.path.is_file():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file:
                notes = file.metadata()
                facts, step = json.loads(notes["facts"]), int(notes["step"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            message = f"{self.path}: damaged ({error}); remove it to start from the beginning"
            raise CheckpointError(message) from error
        if facts != self.facts:
            differing = sorted(name for name in self.facts if facts.get(name) != self.facts[name])
            message = (
                f"{self.path}: unfinished work with another {', '.join(differing)}; repeat the "
                f"command it was started with, remove it, or choose another --out"
            )
            raise CheckpointError(message)
        model.load_state_dict(_under("model.", tensors))
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, _, key = name.partition(".")
            states.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        return step

    def remove(self) -> None:
        """The bundle is written; the way to it is of no use."""
        self.path.unlink(missing_ok=True)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
