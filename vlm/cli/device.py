"""The option `--device` of verbs that compute."""

import torch

from vlm.errors import VlmError

__all__ = ["usable_device"]


def usable_device(name: str) -> str:
    """The name again, if tensors can live there.

    Raises:
        VlmError: If there is no such device here.
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count()
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(count))])
        reason = (str(error).splitlines() or ["no reason given"])[0]
        message = f"--device {name}: cannot be used ({reason}); there is {there}"
        raise VlmError(message) from error
    return name
