"""What passes between the floors, and the legend of tensor axes.

Axis words used in shape annotations everywhere:

    batch         samples of one micro-batch on one rank
    global_batch  samples of all ranks together
    dim           width of the embedding
    teacher_dim   width of a frozen teacher's embedding
    token         positions of a tokenized caption
    vocab         entries of the tokenizer's vocabulary
    channel height width   of an image
    class         classes of a zero-shot task
    label         places for the labels of a sample
    template      prompts of one class
    position      places at which a decoder predicts the next token
    width         inner width of a tower
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from jaxtyping import Float, Int64, UInt8
from torch import Tensor

__all__ = [
    "IGNORED_TOKEN",
    "WHOLE",
    "Batch",
    "CaptionRows",
    "CaptionSum",
    "DualEncoderOutput",
    "Features",
    "LossOutput",
    "Memory",
    "RowShare",
    "Tokenize",
]

IGNORED_TOKEN: Final = -100
"""A target that is no token. Not the padding id 0, which is a token too: `!` before a mark."""

Tokenize = Callable[[list[str]], Int64[Tensor, "batch token"]]
"""Captions to padded token ids."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, as the data plane hands it over."""

    images: UInt8[Tensor, "batch channel height width"]
    token_ids: Int64[Tensor, "batch token"]
    sample_ids: Int64[Tensor, " batch"]
    """Stable 64-bit id of each sample, the same in every run and on every rank."""
    group_ids: Int64[Tensor, " batch"]
    """Samples with equal group ids show the same concept and are never negatives of each other."""
    label_ids: Int64[Tensor, "batch label"] | None = None
    """Ids of each sample's labels, padded with -1; where the data plane is asked for them."""


@dataclass(frozen=True, kw_only=True)
class CaptionRows:
    """What a captioning decoder returns: logits are `hidden @ vocabulary.T`, for who can pay."""

    hidden: Float[Tensor, "batch position width"]
    targets: Int64[Tensor, "batch position"]
    """The next token, or `IGNORED_TOKEN` after the end of a caption."""
    vocabulary: Float[Tensor, "vocab width"]


@dataclass(frozen=True, kw_only=True)
class DualEncoderOutput:
    """What a dual encoder returns for one micro-batch."""

    image: Float[Tensor, "batch dim"]
    """Unit rows."""
    text: Float[Tensor, "batch dim"]
    """Unit rows."""
    logit_scale: Float[Tensor, "1"]
    """exp of the learnt log inverse temperature, clamped to [1, 100]."""
    logit_bias: Float[Tensor, "1"] | None = None
    more_images: tuple[Float[Tensor, "batch dim"], ...] = ()
    """Unit rows of further views of the same images."""
    captions: CaptionRows | None = None
    """Of a model that also writes captions."""


@dataclass(frozen=True, kw_only=True)
class CaptionSum:
    """How well captions were told: of a micro-batch, or of all ranks. Rows are too many to keep."""

    loss: Float[Tensor, ""]
    """Negative log-likelihood, summed over tokens."""
    tokens: Float[Tensor, ""]
    """How many were to be told; no gradient."""


def _alone(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, kw_only=True)
class RowShare:
    """Which rows of a matrix of pairs this process reduces, of several that hold the same features.

    Each of W processes reduces its rows against all columns, `total` and `largest` join the parts,
    and all go on with the same whole result. Backwards, each adds up the gradients that all bring
    for that result, W times the true one, and sends them through its own rows: what a process hands
    back differs from another's, and the mean of all is the true gradient. That is what processes
    which compute the same loss W times over have too, so shared and repeated work may be mixed in
    one graph, in any order.
    """

    index: int = 0
    count: int = 1
    total: Callable[[Tensor], Tensor] = _alone
    """The sum over processes; backwards too, it sums."""
    largest: Callable[[Tensor], Tensor] = _alone
    """The maximum over processes, element by element, without gradient."""

    def own(self, length: int) -> slice:
        """This process's part of so many rows; parts differ by one row at most."""
        return slice(self.index * length // self.count, (self.index + 1) * length // self.count)


WHOLE: Final = RowShare()
"""All rows, in a process that works alone."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """The global batch as loss terms see it: gathered, float32, in rank order."""

    image: Float[Tensor, "global_batch dim"]
    text: Float[Tensor, "global_batch dim"]
    logit_scale: Float[Tensor, "1"]
    logit_bias: Float[Tensor, "1"] | None
    group_ids: Int64[Tensor, " global_batch"]
    captions: CaptionSum | None = None
    """Of all ranks, where the model writes captions."""
    teacher_image: Float[Tensor, "global_batch teacher_dim"] | None = None
    """Unit rows of a frozen teacher, where the run has one; no gradient."""
    teacher_text: Float[Tensor, "global_batch teacher_dim"] | None = None
    teacher_logit_scale: Float[Tensor, "1"] | None = None
    label_ids: Int64[Tensor, "global_batch label"] | None = None
    """Ids of each sample's labels, padded with -1, where the run reads them."""
    share: RowShare = WHOLE
    """The rows that this process reduces against all; every process has all features."""

    def require_teacher(
        self, term: str
    ) -> tuple[
        Float[Tensor, "global_batch teacher_dim"],
        Float[Tensor, "global_batch teacher_dim"],
        Float[Tensor, "1"],
    ]:
        """The teacher's images, captions and logit scale.

        Raises:
            ValueError: If the run has no teacher; `term` names who asked.
        """
        image, text, scale = self.teacher_image, self.teacher_text, self.teacher_logit_scale
        if image is None or text is None or scale is None:
            message = f"{term} needs the embeddings of a teacher, and there is none"
            raise ValueError(message)
        return image, text, scale


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What loss terms remember from step to step, by `type/name`; never with gradient."""

    samples: dict[str, Float[Tensor, " global_batch"]] = field(default_factory=dict)
    """Of the samples of this batch."""
    run: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Of the run as a whole."""


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """The weighted sum of all terms, and named figures for the log."""

    total: Float[Tensor, ""]
    statistics: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
