"""The gradient cache: a global batch of any size, in the memory of one micro-batch.

A contrastive loss needs the embeddings of the whole batch at once, but not what the towers keep to
differentiate them. So a step goes through the data twice:

1. Every micro-batch is embedded without gradient; the little that the loss needs of it is kept.
   Then the loss of all ranks is evaluated, once, and differentiated as far as the embeddings.
2. Every micro-batch is embedded again, with the same random numbers, and the gradients of its
   embeddings go back through the towers. Ranks add up their gradients with the last one.

The gradients are those of the step that keeps everything, for one more forward pass. A sum over
tokens, as CoCa's caption loss, goes through as one more number of each micro-batch.

Source: GradCache (arXiv:2101.06983), here with random numbers replayed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from vlm.errors import VlmError
from vlm.losses import caption_sum
from vlm.train.engine import Engine
from vlm.types import CaptionSum, DualEncoderOutput, LossOutput

__all__ = ["Evaluate", "backward_by_parts"]

_MAX_DRIFT: Final = 0.05
"""Of a coordinate of a unit vector between the passes; bfloat16 kernels may differ by 0.01."""

Evaluate = Callable[[DualEncoderOutput, CaptionSum | None], LossOutput]
"""The loss of all ranks, from this rank's embeddings and the sum over its captions."""


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What the loss needs of a micro-batch, or of all of them."""

    rows: list[Tensor]
    """Captions, images and further views, [batch dim] each."""
    shared: list[Tensor]
    """Logit scale and bias: the same of every micro-batch."""
    sums: list[Tensor]
    """The caption loss, if the model tells captions: added over micro-batches."""
    tokens: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.rows, *self.shared, *self.sums]


def backward_by_parts(
    engine: Engine, forwards: Sequence[Callable[[], DualEncoderOutput]], evaluate: Evaluate
) -> LossOutput:
    """The loss of all micro-batches together; its gradients are in the parameters afterwards.

    Running averages, as of batch norm, change once a step, with the second pass; the statistics
    of batch norm are those of a micro-batch.

    Args:
        engine: Runs the passes and adds up gradients.
        forwards: Embed one micro-batch of this rank each; called twice, to the same result.
        evaluate: The loss; called once, by all ranks.

    Raises:
        VlmError: If a micro-batch is not embedded in the second pass as it was in the first, which
            would make gradients wrong: a model that draws numbers from elsewhere than torch.
    """
    with torch.no_grad(), _unchanged_buffers(engine.model):
        parts = [_share(forward()) for forward in forwards]
    leaf = _join(parts)
    loss = evaluate(_output(leaf), _captions(leaf))
    gradients = torch.autograd.grad(
        loss.total, leaf.tensors, allow_unused=True, materialize_grads=True
    )
    cut = _cut(leaf, gradients, [len(part.rows[0]) for part in parts])
    drift = torch.zeros((), device=loss.total.device)
    for index, (forward, before, share) in enumerate(zip(forwards, parts, cut, strict=True)):
        with engine.synchronising(index == len(forwards) - 1):
            fresh = _share(forward())
            drift = torch.maximum(drift, _distance(fresh, before))
            engine.backward(_product(fresh, share))
    if not float(drift) <= _MAX_DRIFT and all(bool(row.isfinite().all()) for row in leaf.rows):
        message = (
            f"a micro-batch was embedded otherwise the second time, by {float(drift):.2g} in a "
            f"coordinate, so its gradients would be wrong. The model draws random numbers from "
            f"elsewhere than torch, or keeps state from one forward to the next: train it without "
            f"micro_batch"
        )
        raise VlmError(message)
    return LossOutput(total=loss.total.detach(), statistics=loss.statistics, memory=loss.memory)


def _share(output: DualEncoderOutput) -> _Share:
    captions = None if output.captions is None else caption_sum(output.captions)
    bias = output.logit_bias
    return _Share(
        rows=[output.text, output.image, *output.more_images],
        shared=[output.logit_scale, *([] if bias is None else [bias])],
        sums=[] if captions is None else [captions.loss],
        tokens=None if captions is None else captions.tokens,
    )


def _join(parts: Sequence[_Share]) -> _Share:
    """All micro-batches of this rank as one, to be differentiated so far."""
    counted = [part.tokens for part in parts if part.tokens is not None]
    return _Share(
        rows=[
            torch.cat(rows).requires_grad_() for rows in zip(*(p.rows for p in parts), strict=True)
        ],
        shared=[tensor.detach().clone().requires_grad_() for tensor in parts[0].shared],
        sums=[
            torch.stack(sums).sum().requires_grad_()
            for sums in zip(*(p.sums for p in parts), strict=True)
        ],
        tokens=torch.stack(counted).sum() if counted else None,
    )


def _output(share: _Share) -> DualEncoderOutput:
    text, image, *more = share.rows
    scale, *bias = share.shared
    return DualEncoderOutput(
        image=image,
        text=text,
        logit_scale=scale,
        logit_bias=bias[0] if bias else None,
        more_images=tuple(more),
    )


def _captions(share: _Share) -> CaptionSum | None:
    if share.tokens is None:
        return None
    return CaptionSum(loss=share.sums[0], tokens=share.tokens)


def _cut(whole: _Share, gradients: Sequence[Tensor], sizes: list[int]) -> list[_Share]:
    """The gradients of each micro-batch; of what all share, each brings an equal part."""
    first, second = len(whole.rows), len(whole.rows) + len(whole.shared)
    rows = zip(*(gradient.split(sizes) for gradient in gradients[:first]), strict=True)
    shared = [gradient / len(sizes) for gradient in gradients[first:second]]
    sums = list(gradients[second:])
    return [_Share(rows=list(own), shared=shared, sums=sums, tokens=None) for own in rows]


def _product(share: _Share, gradients: _Share) -> Tensor:
    """A number whose gradient is that of the loss."""
    pairs = zip(share.tensors, gradients.tensors, strict=True)
    return torch.stack([(tensor * gradient).sum() for tensor, gradient in pairs]).sum()


def _distance(one: _Share, other: _Share) -> Tensor:
    pairs = zip(one.rows, other.rows, strict=True)
    return torch.stack([(a.detach() - b).abs().max() for a, b in pairs]).max()


@contextmanager
def _unchanged_buffers(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    for buffer, value in before:
        buffer.copy_(value)
