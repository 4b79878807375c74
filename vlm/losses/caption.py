"""CoCa's caption loss, without the logits of all tokens over the whole vocabulary.

A batch of 256 captions of 76 tokens over 49,408 entries is 3.8 GB of logits, and as much again for
their softmax. Here rows meet the vocabulary in chunks, and because the loss is one number, each
chunk's gradient is taken in the same pass, while its softmax is at hand. Autograd keeps the two
gradients, of the size of the two inputs, and nothing is computed twice.
"""

from typing import Any, Final, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.losses.precision import full_precision
from vlm.losses.statistics import Statistics
from vlm.losses.weights import WeightedTerm
from vlm.types import IGNORED_TOKEN, CaptionRows, CaptionSum, Features

__all__ = ["CaptionTerm", "caption_loss", "caption_loss_sum", "caption_sum"]

# 100 MB of float32 logits over CLIP's vocabulary. Fewer rows cost time, since every chunk adds to
# the whole gradient of the vocabulary: on two cores 64 rows take twice as long as 512.
_CPU_CHUNK: Final = 512
_DEVICE_CHUNK: Final = 1024


def caption_loss(
    hidden: Float[Tensor, "row width"],
    vocabulary: Float[Tensor, "vocab width"],
    targets: Int64[Tensor, " row"],
    *,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    r"""Mean negative log-likelihood of the next token; at least 0, ln(vocab) for even guesses.

    $$-\frac{1}{N} \sum_t \log \operatorname{softmax}(W h_t)_{y_t}$$

    Args:
        hidden: Last states of the decoder, one row for each predicted token of any caption.
        vocabulary: The output matrix W.
        targets: The tokens that come next; rows with `IGNORED_TOKEN` count nowhere.
        chunk: Rows whose logits exist at one time; by default what suits the device.

    Returns:
        A scalar in the precision of the inputs, float32 at least; 0 when nothing is to be told.

    Source: L_Cap of CoCa (arXiv:2205.01917), as a mean over tokens, as open_clip has it; one pass
    for value and gradient as in Liger Kernel (arXiv:2410.10989).
    """
    total = caption_loss_sum(hidden, vocabulary, targets, chunk=chunk)
    return total / (targets != IGNORED_TOKEN).sum().clamp(min=1)


def caption_loss_sum(
    hidden: Float[Tensor, "row width"],
    vocabulary: Float[Tensor, "vocab width"],
    targets: Int64[Tensor, " row"],
    *,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """As `caption_loss`, summed over the tokens: what ranks add before they divide.

    Raises:
        ValueError: If `chunk` is below 1.
    """
    size = chunk if chunk is not None else _CPU_CHUNK if hidden.is_cpu else _DEVICE_CHUNK
    if size < 1:
        message = f"logits are computed for at least 1 row at a time, got chunk={chunk}"
        raise ValueError(message)
    told = targets != IGNORED_TOKEN
    total: Tensor = _CaptionLossSum.apply(hidden[told], vocabulary, targets[told], size)  # type: ignore[no-untyped-call] # torch has no types here
    return total


def caption_sum(rows: CaptionRows) -> CaptionSum:
    """The loss of a micro-batch's captions, ready to be added to that of others."""
    targets = rows.targets.flatten()
    loss = caption_loss_sum(rows.hidden.flatten(0, 1), rows.vocabulary, targets)
    return CaptionSum(loss=loss, tokens=(targets != IGNORED_TOKEN).sum().to(loss))


class _CaptionLossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, vocabulary: Tensor, targets: Tensor, chunk: int
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):
            rows, matrix = full_precision(hidden), full_precision(vocabulary)
            by_rows = torch.empty_like(rows) if wanted[0] else None
            by_matrix = torch.zeros_like(matrix) if wanted[1] else None
            total = rows.new_zeros(())
            for start in range(0, len(rows), chunk):
                part = slice(start, start + chunk)
                logits = rows[part] @ matrix.T  # [chunk vocab]
                total += _to_softmax(logits, targets[part])
                if by_rows is not None:
                    torch.mm(logits, matrix, out=by_rows[part])
                if by_matrix is not None:
                    by_matrix.addmm_(logits.T, rows[part])
        ctx.save_for_backward(
            None if by_rows is None else by_rows.to(hidden.dtype),
            None if by_matrix is None else by_matrix.to(vocabulary.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        by_rows, by_matrix = (
            None if saved is None else saved * gradients[0].to(saved.dtype)
            for saved in ctx.saved_tensors
        )
        return by_rows, by_matrix, None, None


def _to_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits in place into the gradient of their loss, softmax - onehot; returns the loss."""
    highest = logits.amax(dim=1, keepdim=True)
    logits -= highest
    chosen = logits.gather(1, targets[:, None])
    logits.exp_()
    normaliser = logits.sum(dim=1, keepdim=True)
    logits /= normaliser
    logits.scatter_add_(1, targets[:, None], torch.full_like(chosen, -1.0))
    return (normaliser.log() - chosen).sum()


class CaptionTerm(WeightedTerm):
    """Mean negative log-likelihood of the captions' tokens; see `caption_loss`.

    CoCa weighs it 2 beside a `clip` of 1; 1 to 1 is within noise of that in its ablation.
    """

    type: Literal["caption"] = "caption"

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        captions = features.captions
        if captions is None:
            message = "the caption loss needs a model that tells captions: model.type: coca"
            raise ValueError(message)
        value = captions.loss / captions.tokens.clamp(min=1)
        return value, {"perplexity": value.exp()}
