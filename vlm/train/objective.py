"""From one rank's embeddings to the loss of the global batch.

Features are gathered once, with gradient, for all terms. Every rank reduces its rows of logits
against all columns, the parts are joined, and all ranks end with the same global loss: W ranks on
B/W samples each equal one process on B, for any sum of terms, at a W-th of the work.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.distributed import (
    World,
    gather_rows,
    gather_rows_with_gradient,
    max_over_ranks,
    sum_with_gradient,
)
from vlm.errors import DataError
from vlm.losses import LossTerm, NoPairsError, caption_sum, full_precision, total_loss
from vlm.train.memory import LossMemory
from vlm.train.teacher import Teacher
from vlm.types import Batch, CaptionSum, DualEncoderOutput, Features, LossOutput, RowShare

__all__ = ["Objective", "global_loss"]


class Objective:
    """The loss of a run: its terms, what they remember, and the teacher that some of them follow.

    Args:
        terms: The loss, as configured.
        memory: What terms remember; changed by every call.
        teacher: A frozen model, if a term needs one.
        world: The ranks.
        counts: Rows of each rank, where they do not all bring equally many.
    """

    def __init__(
        self,
        terms: Sequence[LossTerm],
        *,
        memory: LossMemory,
        teacher: Teacher | None,
        world: World,
        counts: Sequence[int] | None = None,
    ) -> None:
        self.memory = memory
        self._counts = counts
        self._terms = terms
        self._teacher = teacher
        self._world = world

    @property
    def teacher_fingerprint(self) -> str | None:
        return None if self._teacher is None else self._teacher.fingerprint

    @property
    def has_teacher(self) -> bool:
        return self._teacher is not None

    def with_terms(self, terms: Sequence[LossTerm], memory: LossMemory) -> "Objective":
        """Another sum of terms, with the same teacher and ranks."""
        return Objective(
            terms, memory=memory, teacher=self._teacher, world=self._world, counts=self._counts
        )

    def teach(
        self,
        gray_levels: Float[Tensor, "batch channel height width"],
        token_ids: Int64[Tensor, "batch token"],
    ) -> DualEncoderOutput:
        """The teacher's embeddings of a micro-batch; only where there is a teacher."""
        assert self._teacher is not None
        return self._teacher.embed(gray_levels, token_ids)

    def __call__(
        self,
        output: DualEncoderOutput,
        batch: Batch,
        *,
        progress: float,
        taught: Sequence[DualEncoderOutput] = (),
        captions: CaptionSum | None = None,
    ) -> LossOutput:
        """The loss of a step, remembered; see `global_loss`.

        Args:
            output: The model's, of this rank's batch.
            batch: Whose sample and group ids are asked.
            progress: Fraction of training done.
            taught: The teacher's embeddings of all micro-batches of `batch`.
            captions: The caption loss of this rank, where `output` no longer has the rows.

        Raises:
            DataError: If all samples of the step are of one group, and a term needs two.
        """
        try:
            return self._loss(output, batch, progress, taught, captions)
        except NoPairsError as error:
            message = (
                f"the loss cannot tell the samples of this step apart: {error}. "
                f"data.stream.group_field puts them together: name another field, leave it out, "
                f"or raise global_batch"
            )
            raise DataError(message) from error

    def _loss(
        self,
        output: DualEncoderOutput,
        batch: Batch,
        progress: float,
        taught: Sequence[DualEncoderOutput],
        captions: CaptionSum | None,
    ) -> LossOutput:
        device = self._world.device
        return global_loss(
            output,
            batch.group_ids.to(device),
            self._terms,
            progress=progress,
            world=self._world,
            counts=self._counts,
            sample_ids=batch.sample_ids.to(device),
            label_ids=None if batch.label_ids is None else batch.label_ids.to(device),
            memory=self.memory,
            teacher=_joined(taught) if taught else None,
            captions=captions,
        )


def _joined(parts: Sequence[DualEncoderOutput]) -> DualEncoderOutput:
    return DualEncoderOutput(
        image=torch.cat([part.image for part in parts]),
        text=torch.cat([part.text for part in parts]),
        logit_scale=parts[0].logit_scale,
    )


def global_loss(
    output: DualEncoderOutput,
    group_ids: Int64[Tensor, " batch"],
    terms: Sequence[LossTerm],
    *,
    progress: float,
    world: World,
    counts: Sequence[int] | None = None,
    sample_ids: Int64[Tensor, " batch"] | None = None,
    memory: LossMemory | None = None,
    label_ids: Int64[Tensor, "batch label"] | None = None,
    teacher: DualEncoderOutput | None = None,
    captions: CaptionSum | None = None,
) -> LossOutput:
    """Gather the features of all ranks and sum the weighted loss terms.

    Of several views of the images each gives a loss with the captions, and the total is their mean;
    what terms remember is of the first.

    Args:
        output: This rank's embeddings, logit scale and bias.
        group_ids: This rank's groups; equal groups are never negatives of each other.
        terms: The loss, as configured.
        progress: Fraction of training done, in [0, 1]; drives weight schedules.
        world: The ranks.
        counts: Rows of each rank, where they do not all bring equally many. Nobody asks for them:
            what splits a batch knows them, and who does not can ask `gather_counts` once.
        sample_ids: This rank's samples; needed for `memory`.
        memory: What terms remember, changed by this call; none lets them start anew.
        label_ids: This rank's labels, for terms that compare them.
        teacher: A frozen model's embeddings of this rank's batch.
        captions: This rank's caption loss; by default that of the rows in `output`, if any.

    Returns:
        The total and its statistics, with `modality_gap` (distance between the centroids of the
        two modalities, 0 to 2) and `logit_scale` beside those of the terms, all of the first view.
    """
    if captions is None and output.captions is not None:
        captions = caption_sum(output.captions)
    own = [output.text, output.image, *output.more_images]
    # All in one message, [batch len(own)*dim].
    joined = full_precision(torch.cat(own, dim=1))
    gathered = gather_rows_with_gradient(joined, world, counts=counts)
    text, first, *others = gathered.chunk(len(own), dim=1)
    taught = None
    if teacher is not None:
        taught = gather_rows(torch.cat([teacher.image, teacher.text], dim=1), world, counts=counts)
    features = Features(
        image=first,
        text=text,
        logit_scale=full_precision(output.logit_scale),
        logit_bias=None if output.logit_bias is None else full_precision(output.logit_bias),
        group_ids=gather_rows(group_ids, world, counts=counts),
        teacher_image=None if taught is None else taught.chunk(2, dim=1)[0],
        teacher_text=None if taught is None else taught.chunk(2, dim=1)[1],
        teacher_logit_scale=None if teacher is None else full_precision(teacher.logit_scale),
        label_ids=None if label_ids is None else gather_rows(label_ids, world, counts=counts),
        captions=None if captions is None else _over_ranks(captions, world),
        share=RowShare(
            index=world.rank,
            count=world.size,
            total=partial(sum_with_gradient, world=world),
            largest=partial(max_over_ranks, world=world),
        ),
    )
    every = None if sample_ids is None else gather_rows(sample_ids, world, counts=counts)
    recalled = None if memory is None or every is None else memory.recall(every)
    results = [
        total_loss(terms, replace(features, image=image), progress=progress, memory=recalled)
        for image in (first, *others)
    ]
    if memory is not None and every is not None:
        memory.keep(every, results[0].memory)
    gap = (first.mean(dim=0) - text.mean(dim=0)).norm().detach()
    scale = features.logit_scale.detach()[0]
    statistics = {**results[0].statistics, "modality_gap": gap, "logit_scale": scale}
    # Data parallelism wants every parameter in the graph, also where no term asks for it.
    asked = [output.logit_scale, *([] if output.logit_bias is None else [output.logit_bias])]
    unasked = torch.stack([0.0 * full_precision(scalar).sum() for scalar in asked]).sum()
    total = torch.stack([result.total for result in results]).mean() + unasked
    return LossOutput(total=total, statistics=statistics)


def _over_ranks(captions: CaptionSum, world: World) -> CaptionSum:
    both = torch.stack([captions.loss, captions.tokens])
    loss, tokens = sum_with_gradient(both, world).unbind()
    return CaptionSum(loss=loss, tokens=tokens)
