"""Terms whose targets come from a frozen teacher."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.losses.soft import SoftTarget, multi_hot, soft_target_loss
from vlm.losses.statistics import Statistics, contrastive_statistics
from vlm.losses.weights import WeightedTerm
from vlm.types import Features

__all__ = ["DistillationTerm", "SoftClipTerm"]


class SoftClipTerm(WeightedTerm):
    """InfoNCE towards similarities within a modality; see `soft_target_loss`."""

    type: Literal["soft_clip"] = "soft_clip"
    similarity: Literal["text", "image", "own", "labels"] = "text"
    """Of the teacher's captions, of its images, of each row's own modality there, or without a
    teacher the cosine of the samples' label sets (SoftCon, arXiv:2405.20462)."""
    temperature: float = Field(0.05, gt=0)
    """Of the similarities."""
    soft_fraction: float = Field(0.3, gt=0, le=1)
    """Share of the target that follows the similarities; the rest is the row's own match."""

    @property
    def needs_teacher(self) -> bool:
        return self.similarity != "labels"

    @property
    def needs_labels(self) -> bool:
        return self.similarity == "labels"

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        image, text = self._compared(features)
        scale = torch.full_like(image[0, :1], 1 / self.temperature)
        of_images = SoftTarget(rows=image, columns=image, scale=scale)
        of_texts = SoftTarget(rows=text, columns=text, scale=scale)
        value = soft_target_loss(
            features.image,
            features.text,
            features.logit_scale,
            for_images=of_texts if self.similarity == "text" else of_images,
            for_texts=of_images if self.similarity == "image" else of_texts,
            soft_fraction=self.soft_fraction,
            share=features.share,
        )
        return value, contrastive_statistics(features)

    def _compared(self, features: Features) -> tuple[Tensor, Tensor]:
        """The rows whose similarities are the targets of images, and of captions."""
        if self.similarity != "labels":
            image, text, _ = features.require_teacher(self.type)
            return image, text
        if features.label_ids is None:
            message = f"{self.type} with similarity=labels needs label_ids, and there are none"
            raise ValueError(message)
        labels = multi_hot(features.label_ids).to(features.image.dtype)
        return labels, labels


class DistillationTerm(WeightedTerm):
    """The teacher's softmax over the batch as the student's target; see `soft_target_loss`."""

    type: Literal["distillation"] = "distillation"
    temperature: float | None = Field(None, gt=0)
    """Of the teacher's softmax; by default the one it was trained to."""
    soft_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the target that follows the teacher; 0.5 is HyCD of CLIP-Refine."""

    @property
    def needs_teacher(self) -> bool:
        return True

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        image, text, scale = features.require_teacher(self.type)
        if self.temperature is not None:
            scale = torch.full_like(scale, 1 / self.temperature)
        value = soft_target_loss(
            features.image,
            features.text,
            features.logit_scale,
            for_images=SoftTarget(rows=image, columns=text, scale=scale),
            for_texts=SoftTarget(rows=text, columns=image, scale=scale),
            soft_fraction=self.soft_fraction,
            share=features.share,
        )
        return value, contrastive_statistics(features)
