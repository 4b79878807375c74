"""Lion: sign of an interpolated momentum, one buffer a parameter."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from vlm.optim.base import Groups, OptimizerSettings
from vlm.optim.lion_triton import fused_lion, fuses

__all__ = ["Lion", "LionConfig"]


class LionConfig(OptimizerSettings):
    """Lion (arXiv:2302.06675); 3 to 10 times less `lr` and more `weight_decay` than AdamW."""

    type: Literal["lion"] = "lion"
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate, reached at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    """(0.95, 0.98) is steadier where training is not (section 5 of the paper)."""
    weight_decay: float = Field(2.0, ge=0)
    cautious: bool = False
    """Move only entries whose step agrees in sign with the gradient (arXiv:2411.16085)."""
    momentum_precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 halves the optimizer's memory."""

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        return Lion(
            groups,
            lr=self.lr,
            betas=self.betas,
            cautious=self.cautious,
            momentum_dtype=torch.bfloat16 if self.momentum_precision == "bf16" else None,
        )

    def advice(self) -> list[str]:
        if self.lr < 1e-3 and (self.lr < 5e-4 or self.weight_decay > 0.5):
            return []
        return [
            f"optim.lr={self.lr:g} with optim.weight_decay={self.weight_decay:g} looks like "
            f"AdamW's. Lion moves every weight by lr each step: try optim.lr={self.lr / 10:.2g} "
            f"optim.weight_decay={self.weight_decay * 10:.2g}"
        ]


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
        cautious: Drop the entries of an update whose sign differs from the gradient's, and scale
            the others up by the inverse of their fraction (at most 1000).
        momentum_dtype: Of the buffer; the parameter's own if none. The arithmetic is that of the
            gradient, so bfloat16 only rounds what is remembered.

    Source: Algorithm 2 of Chen et al. 2023 (arXiv:2302.06675); the cautious variant is Algorithm 1
    of Liang et al. 2024 (arXiv:2411.16085), with the scale that its code and timm's use.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        cautious: bool = False,
        momentum_dtype: torch.dtype | None = None,
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
        self._cautious = cautious
        self._momentum_dtype = momentum_dtype
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
        triples = [
            (_local(p), _local(_gradient(p)), _local(self._buffer(p, "exp_avg", momentum=True)))
            for p in parameters
        ]
        together = []
        for triple in triples:
            if fuses(*triple) and not self._cautious:
                fused_lion(
                    *triple,
                    lr=group["lr"],
                    betas=group["betas"],
                    weight_decay=group["weight_decay"],
                )
            else:
                together.append(triple)
        if together:
            self._foreach(together, group)

    def _foreach(self, triples: list[tuple[Tensor, Tensor, Tensor]], group: dict[str, Any]) -> None:
        """One step of parameters, gradients and momenta, many tensors at a time."""
        lr, (beta1, beta2) = group["lr"], group["betas"]
        parameters, gradients, momenta = (list(column) for column in zip(*triples, strict=True))
        # Momenta of lower precision are widened for the arithmetic and rounded once at the end.
        wide = [
            m if m.dtype == g.dtype else m.to(g.dtype)
            for m, g in zip(momenta, gradients, strict=True)
        ]
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        updates = list(torch._foreach_lerp(wide, gradients, 1 - beta1))
        torch._foreach_sign_(updates)
        if self._cautious:
            for update, gradient in zip(updates, gradients, strict=True):
                agrees = (update * gradient > 0).to(update.dtype)
                update.mul_(agrees.div_(agrees.mean().clamp_(min=1e-3)))
        torch._foreach_add_(parameters, updates, alpha=-lr)
        torch._foreach_lerp_(wide, gradients, 1 - beta2)
        for momentum, widened in zip(momenta, wide, strict=True):
            if momentum is not widened:
                momentum.copy_(widened)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        for parameter in parameters:
            gradient = _local(_gradient(parameter))
            state = self.state[parameter]
            mean = _local(self._buffer(parameter, "exp_avg"))
            square = _local(self._buffer(parameter, "exp_avg_sq"))
            state["step"] = state.get("step", 0) + 1
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            first = 1 - beta1 ** state["step"]
            second = 1 - beta2 ** state["step"]
            denominator = (square / second).sqrt_().add_(group["eps"])
            own = _local(parameter)
            own.mul_(1 - lr * group["weight_decay"])
            own.addcdiv_(mean, denominator, value=-lr / first)

    def _buffer(self, parameter: Tensor, name: str, *, momentum: bool = False) -> Tensor:
        """A buffer of the parameter's shape, zeros at first; loading a state widens it again."""
        state = self.state[parameter]
        dtype = (self._momentum_dtype if momentum else None) or parameter.dtype
        if name not in state:
            state[name] = torch.zeros_like(
                parameter, dtype=dtype, memory_format=torch.preserve_format
            )
        elif state[name].dtype != dtype:
            state[name] = state[name].to(dtype)
        buffer: Tensor = state[name]
        return buffer


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory: Lion needs no other part."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def _gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient
