"""Several optimizers as one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["Together"]


class Together(torch.optim.Optimizer):
    """Optimizers over different parameters that step, save and load as one.

    Their groups are the very groups of this one and their state is this one's state, so schedules,
    engines and checkpoints see a single optimizer.

    Args:
        parts: Optimizers that share no parameter.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self._parts = tuple(parts)
        self._sizes = [len(part.param_groups) for part in parts]
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # replaces groups and state by new objects
        self._share()

    def _share(self) -> None:
        start = 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            part.param_groups = self.param_groups[start : start + size]
            part.state = self.state
            start += size
