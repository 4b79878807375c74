"""CoCa's text decoder: one half that only reads text, one that also looks at the image.

Sequences are a start mark, the caption, an end mark, then padding, which is whatever stands behind
the end mark: the highest id of the vocabulary.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from vlm.config import Config
from vlm.models.attention import Block, KeysValues, causal_mask, run_block

__all__ = ["CaptionDecoder", "CaptionDecoderConfig", "DecoderState", "real_tokens"]


class CaptionDecoderConfig(Config):
    """Two halves of transformer layers; CoCa-Base has 12 and 12 of width 768."""

    width: int = Field(512, ge=8)
    heads: int = Field(8, ge=1)
    unimodal_layers: int = Field(6, ge=1)
    """Causal, and blind to the image; they give the text embedding. Half of all is best."""
    multimodal_layers: int = Field(6, ge=1)
    """Causal, with cross-attention to the image; they give the captions."""
    mlp_ratio: float = Field(4.0, gt=0)
    vocab_size: int = Field(49408, ge=3)
    """The last two ids are the start and the end mark."""


@dataclass(frozen=True, kw_only=True)
class DecoderState:
    """All that a decoder remembers of rows it has read: keys and values of every layer."""

    length: int
    """Positions read so far."""
    unimodal: tuple[KeysValues | None, ...]
    multimodal: tuple[KeysValues | None, ...]
    image: tuple[KeysValues, ...]

    def rows(self, index: Int64[Tensor, " picked"]) -> "DecoderState":
        """The state of a batch made of these rows, which may repeat."""
        return DecoderState(
            length=self.length,
            unimodal=tuple(None if layer is None else layer.rows(index) for layer in self.unimodal),
            multimodal=tuple(
                None if layer is None else layer.rows(index) for layer in self.multimodal
            ),
            image=tuple(layer.rows(index) for layer in self.image),
        )


class CaptionDecoder(nn.Module):
    """The two halves, the [CLS] token behind every caption, and the output vocabulary.

    [CLS] has no position: wherever a batch ends, it is the same token, so padding that is cut off
    changes nothing. It is the last key, so causal tokens never see it; it sees no padding.

    Args:
        config: Sizes.
        context_length: Most tokens of a sequence, marks included.
        image_width: Width of the image rows to look at.
    """

    def __init__(
        self, config: CaptionDecoderConfig, *, context_length: int, image_width: int
    ) -> None:
        super().__init__()
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.unimodal = nn.ModuleList(
            Block(width, config.heads, mlp_ratio=config.mlp_ratio)
            for _ in range(config.unimodal_layers)
        )
        self.class_norm = nn.LayerNorm(width)
        self.multimodal = nn.ModuleList(
            Block(width, config.heads, mlp_ratio=config.mlp_ratio, memory_width=image_width)
            for _ in range(config.multimodal_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.vocabulary = nn.Parameter(torch.empty(config.vocab_size, width))
        self._recompute = False
        self._initialise(config.unimodal_layers + config.multimodal_layers)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self._recompute = enable

    def _initialise(self, layers: int) -> None:
        """Normal of 0.02; what is added to the residual stream is smaller the more layers add."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("out.weight", "mlp.2.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5)
            elif parameter.ndim > 1 or name == "class_embedding":
                nn.init.normal_(parameter, std=0.02)

    def read(
        self, token_ids: Int64[Tensor, "batch token"]
    ) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch token width"]]:
        """The unimodal half over whole sequences: the state of [CLS], and those of the tokens."""
        rows = self._embed(token_ids, start=0)
        mark = self.class_embedding.to(rows.dtype).expand(len(rows), 1, -1)
        rows = torch.cat([rows, mark], dim=1)
        mask = _reading_mask(real_tokens(token_ids))
        for block in self.unimodal:
            rows = run_block(block, rows, mask=mask, recompute=self._recompute and self.training)
        return self.class_norm(rows[:, -1]), rows[:, :-1]

    def look(
        self,
        rows: Float[Tensor, "batch token width"],
        image: Float[Tensor, "batch place image_width"],
    ) -> Float[Tensor, "batch token width"]:
        """The multimodal half over the tokens' states: what predicts the token after each."""
        mask = causal_mask(rows.shape[1], past=0, device=rows.device)
        recompute = self._recompute and self.training
        for block in self.multimodal:
            rows = run_block(block, rows, mask=mask, image=image, recompute=recompute)
        return self.norm(rows)

    def begin(self, image: Float[Tensor, "batch place image_width"]) -> DecoderState:
        """The state before the start mark: the image alone, projected once for all steps."""
        return DecoderState(
            length=0,
            unimodal=(None,) * len(self.unimodal),
            multimodal=(None,) * len(self.multimodal),
            image=tuple(block.memory_of(image) for block in self.multimodal),  # type: ignore[operator] # nn.Module hides it
        )

    def step(
        self, token_ids: Int64[Tensor, "batch token"], state: DecoderState
    ) -> tuple[Float[Tensor, "batch token width"], DecoderState]:
        """Both halves over further tokens: what predicts the token after each, and the new state.

        Equal to `look` over `read` of the whole sequence, at the cost of the new tokens.
        """
        rows = self._embed(token_ids, start=state.length)
        new = token_ids.shape[1]
        mask = causal_mask(new, past=state.length, device=rows.device)
        unimodal, multimodal = [], []
        for block, past in zip(self.unimodal, state.unimodal, strict=True):
            rows, seen = block(rows, mask=mask, past=past)
            unimodal.append(seen)
        layers = zip(self.multimodal, state.multimodal, state.image, strict=True)
        for block, past, memory in layers:
            rows, seen = block(rows, mask=mask, past=past, memory=memory)
            multimodal.append(seen)
        after = DecoderState(
            length=state.length + new,
            unimodal=tuple(unimodal),
            multimodal=tuple(multimodal),
            image=state.image,
        )
        return self.norm(rows), after

    def _embed(self, token_ids: Tensor, *, start: int) -> Tensor:
        positions = self.positional_embedding[start : start + token_ids.shape[1]]
        return self.token_embedding(token_ids) + positions


def real_tokens(token_ids: Int64[Tensor, "batch token"]) -> Bool[Tensor, "batch token"]:
    """True up to the end mark, the highest id of its row, and false on the padding behind it."""
    ends = token_ids.argmax(dim=1, keepdim=True)
    return torch.arange(token_ids.shape[1], device=token_ids.device) <= ends


def _reading_mask(real: Bool[Tensor, "batch token"]) -> Bool[Tensor, "batch 1 read read"]:
    """Causal among the tokens; [CLS], the last row, sees the real tokens and itself."""
    batch, length = real.shape
    mask = torch.ones(length + 1, length + 1, dtype=torch.bool, device=real.device).tril()
    mask = mask.expand(batch, 1, -1, -1).clone()
    mask[:, 0, -1, :-1] = real
    return mask
