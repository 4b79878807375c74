"""Lion: sign of an interpolated momentum, one buffer a parameter."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Lion"]


class Lion(torch.optim.Optimizer):
    r"""Lion with decoupled weight decay, and AdamW for the groups that need it.

    $$p \leftarrow p (1 - \eta\lambda),\quad
      p \leftarrow p - \eta\,\mathrm{sign}(\beta_1 m + (1-\beta_1) g),\quad
      m \leftarrow \beta_2 m + (1-\beta_2) g$$

    A parameter group with `rule="adamw"` is updated by AdamW instead. Scalars such as the log
    logit scale belong there: under Lion a scalar moves exactly `lr` a step, so it would need tens
    of thousands of steps to arrive. One optimizer object keeps both, so checkpoints and engines
    see one state.

    Args:
        params: Parameters or groups; a group may set `lr`, `betas`, `weight_decay`, `rule`, `eps`.
        lr: Learning rate; the paper advises 3 to 10 times less than AdamW's.
        betas: Interpolation for the update, and decay of the momentum.
        weight_decay: Decoupled decay; the paper advises 3 to 10 times more than AdamW's.

    Source: Algorithm 2 of Chen et al. 2023 (arXiv:2302.06675).
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or not all(0 <= beta < 1 for beta in betas) or weight_decay < 0:
            message = (
                f"Lion needs lr >= 0, betas in [0, 1) and weight_decay >= 0; "
                f"got lr={lr}, betas={betas}, weight_decay={weight_decay}"
            )
            raise ValueError(message)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "rule": "lion",
            "eps": 1e-8,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            if group["rule"] not in ("lion", "adamw"):
                message = f"a group's rule is 'lion' or 'adamw', got {group['rule']!r}"
                raise ValueError(message)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["rule"] == "adamw":
                self._adamw(parameters, group)
            else:
                self._lion(parameters, group)
        return loss

    def _lion(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        gradients = [_gradient(p) for p in parameters]
        momenta = [self._buffer(p, "exp_avg") for p in parameters]
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        updates = torch._foreach_lerp(momenta, gradients, 1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_add_(parameters, updates, alpha=-lr)
        torch._foreach_lerp_(momenta, gradients, 1 - beta2)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        for parameter in parameters:
            gradient = _gradient(parameter)
            state = self.state[parameter]
            mean = self._buffer(parameter, "exp_avg")
            square = self._buffer(parameter, "exp_avg_sq")
            state["step"] = state.get("step", 0) + 1
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            first = 1 - beta1 ** state["step"]
            second = 1 - beta2 ** state["step"]
            denominator = (square / second).sqrt_().add_(group["eps"])
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.addcdiv_(mean, denominator, value=-lr / first)

    def _buffer(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        buffer: Tensor = state[name]
        return buffer


def _gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient
