"""CoCa: a dual encoder whose text tower goes on to write captions (arXiv:2205.01917).

    image -> image tower -> rows -> caption pooler (256 queries) -> rows for the decoder
                                        -> contrastive pooler (1 query) -> image embedding
    text  -> unimodal half  -> [CLS] -> text embedding
                            -> multimodal half, looking at the image's rows -> next tokens

The poolers are a cascade, the second reading what the first returns, which is the paper's default.
With `caption_queries: 0` the first is left out, and decoder and contrastive pooler read the image
tower itself: the paper's ablation loses nothing by that.

Own modules throughout: open_clip's CoCa pools both from one set of queries, masks [CLS] wrongly by
default, and cannot decode with a cache. So its checkpoints do not load here, nor ours there.
"""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from vlm.config import Config
from vlm.models.attention import AttentionalPooler
from vlm.models.caption_decoder import (
    CaptionDecoder,
    CaptionDecoderConfig,
    DecoderState,
    real_tokens,
)
from vlm.models.dual_encoder import MAX_LOG_LOGIT_SCALE, unit_rows
from vlm.models.freezing import FreezeConfig, evaluate_frozen
from vlm.models.image_tokens import TokenTower, build_image_tokens
from vlm.types import IGNORED_TOKEN, CaptionRows, DualEncoderOutput

__all__ = ["CoCa", "CocaConfig"]


class CocaConfig(Config):
    """An image tower, a decoder in two halves, and the poolers between them."""

    type: Literal["coca"] = "coca"
    dim: int = Field(512, ge=2)
    """Width of the embeddings."""
    image: TokenTower
    text: CaptionDecoderConfig = CaptionDecoderConfig()
    start: Path | None = None
    """The bundle of a CoCa of the same sizes, of any resolution and context length."""
    caption_queries: int = Field(256, ge=0)
    """Rows that the decoder sees of an image; 0 shows it all of the image tower's. Never 1."""
    pooler_heads: int = Field(8, ge=1)
    """Heads of both poolers."""
    init_logit_scale: float = Field(1 / 0.07, ge=1, le=100)
    """Starting logit scale, the inverse temperature."""
    init_logit_bias: float | None = None
    """Starting logit bias for sigmoid losses, -10 in SigLIP; none for softmax losses."""
    freeze: FreezeConfig = FreezeConfig()
    gradient_checkpointing: bool = False
    """Compute the blocks twice rather than keep what is between them: less memory."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> "CocaConfig":
        if self.caption_queries == 1:
            message = "caption_queries=1 starves the decoder; choose 0 or 32 and more"
            raise ValueError(message)
        for name, heads in (("text.heads", self.text.heads), ("pooler_heads", self.pooler_heads)):
            if self.text.width % heads:
                message = f"text.width={self.text.width} does not divide over {name}={heads}"
                raise ValueError(message)
        return self


class CoCa(nn.Module):
    """Unit embeddings of images and captions in one space, and captions of images.

    Args:
        config: Towers and sizes.
        image_size: Side of the images in pixels.
        context_length: Most tokens of a caption, marks included.
    """

    def __init__(self, config: CocaConfig, *, image_size: int, context_length: int) -> None:
        super().__init__()
        # From which the same model is built again.
        self.architecture: dict[str, Any] = {
            "config": _architecture(config),
            "image_size": image_size,
            "context_length": context_length,
        }
        width = config.text.width
        self.image = build_image_tokens(config.image, image_size=image_size)
        rows_width = int(self.image.width)  # type: ignore[arg-type] # nn.Module hides it
        self.caption_pooler: AttentionalPooler | None = None
        if config.caption_queries:
            self.caption_pooler = AttentionalPooler(
                config.caption_queries, width, config.pooler_heads, memory_width=rows_width
            )
            rows_width = width
        self.contrastive_pooler = AttentionalPooler(
            1, width, config.pooler_heads, memory_width=rows_width
        )
        self.image_projection = nn.Linear(width, config.dim, bias=False)
        self.text = CaptionDecoder(
            config.text, context_length=context_length, image_width=rows_width
        )
        self.text_projection = nn.Linear(width, config.dim, bias=False)
        self.log_logit_scale = nn.Parameter(torch.tensor([math.log(config.init_logit_scale)]))
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor([bias]))

    def train(self, mode: bool = True) -> "CoCa":
        """As of any module, but what is frozen stays in evaluation mode."""
        super().train(mode)
        evaluate_frozen(self)
        return self

    def forward(
        self,
        images: Float[Tensor, "batch channel height width"],
        token_ids: Int64[Tensor, "batch token"],
    ) -> DualEncoderOutput:
        image_rows = self.image_rows(images)
        mark, text_rows = self.text.read(token_ids)
        hidden = self.text.look(text_rows[:, :-1], image_rows)  # the last token has no next one
        told = real_tokens(token_ids)[:, 1:]
        return DualEncoderOutput(
            image=self._embed_image(image_rows),
            text=unit_rows(self.text_projection(mark)),
            logit_scale=self.logit_scale(),
            logit_bias=self.logit_bias,
            captions=CaptionRows(
                hidden=hidden,
                targets=token_ids[:, 1:].masked_fill(~told, IGNORED_TOKEN),
                vocabulary=self.text.vocabulary,
            ),
        )

    def encode_image(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch dim"]:
        """Unit float32 embeddings of normalised images."""
        return self._embed_image(self.image_rows(images))

    def encode_text(self, token_ids: Int64[Tensor, "batch token"]) -> Float[Tensor, "batch dim"]:
        """Unit float32 embeddings of tokenized captions; trimmed padding changes nothing."""
        mark, _ = self.text.read(token_ids)
        return unit_rows(self.text_projection(mark))

    def image_rows(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch place rows_width"]:
        """What the decoder looks at: the caption pooler's rows, or the image tower's."""
        rows: Tensor = self.image(images)
        return rows if self.caption_pooler is None else self.caption_pooler(rows)

    def begin(self, image_rows: Float[Tensor, "batch place rows_width"]) -> DecoderState:
        """The state of a decoder that has read nothing yet; see `vlm.inference.generate`."""
        return self.text.begin(image_rows)

    def step(
        self, token_ids: Int64[Tensor, "batch token"], state: DecoderState
    ) -> tuple[Float[Tensor, "batch token width"], DecoderState]:
        """Last states at further tokens, and the state after them."""
        return self.text.step(token_ids, state)

    def logits(self, hidden: Float[Tensor, "*row width"]) -> Float[Tensor, "*row vocab"]:
        """Of the next token, in float32, or float64 for a float64 model."""
        return _full(hidden) @ _full(self.text.vocabulary).T

    @property
    def vocab_size(self) -> int:
        """Token ids that the text tower knows."""
        return len(self.text.vocabulary)

    def logit_scale(self) -> Float[Tensor, "1"]:
        """The multiplier of cosines, in [1, 100]; clamped here for sharded optimizers."""
        return self.log_logit_scale.clamp(0.0, MAX_LOG_LOGIT_SCALE).exp()

    def _embed_image(self, image_rows: Tensor) -> Tensor:
        pooled = self.contrastive_pooler(image_rows)[:, 0]
        return unit_rows(self.image_projection(pooled))


def _architecture(config: CocaConfig) -> dict[str, Any]:
    """All that decides the modules and how they compute, but not how they are trained."""
    tree = config.model_dump(mode="json", exclude={"start", "freeze", "gradient_checkpointing"})
    for key in ("pretrained", "weights"):
        tree["image"].pop(key, None)
    return tree


def _full(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
