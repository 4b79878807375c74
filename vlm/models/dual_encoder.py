"""Two towers and a logit scale: the model of CLIP, ALIGN and SigLIP.

The towers are open_clip's own modules, so weights go to and from open_clip by renaming two
prefixes. The logit scale is a parameter of shape [1], because sharding engines refuse 0-dim ones.
"""

import itertools
import math
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from vlm.config import Config
from vlm.errors import ConfigError
from vlm.models.checkpoints import find_checkpoint
from vlm.models.freezing import FreezeConfig, evaluate_frozen
from vlm.models.last_block import read_out_one_position, reads_end_mark, run_to_position
from vlm.models.towers import ImageTower, TextTower
from vlm.types import DualEncoderOutput

__all__ = [
    "MAX_LOG_LOGIT_SCALE",
    "DualEncoder",
    "DualEncoderConfig",
    "clamp_logit_scale",
    "set_logit_scale",
]

MAX_LOG_LOGIT_SCALE = math.log(100.0)
_DIM = 512
_PREFIXES = {"image.": "visual.", "text.": "text."}


class DualEncoderConfig(Config):
    """An image tower, a text tower and the width of the space they share.

    With `start`, a trained model goes on; it also gives the towers that are not given here.
    """

    type: Literal["dual_encoder"] = "dual_encoder"
    dim: int | None = Field(None, ge=2)
    """Width of the embeddings: by default 512, or that of the model that gives the towers."""
    image: ImageTower | None = None
    text: TextTower | None = None
    start: str | None = None
    """A bundle, local-dir:FOLDER, ViT-B-32/laion2b_s34b_b79k, hf-hub:NAME: `models.checkpoints`."""
    init_logit_scale: float = Field(1 / 0.07, ge=1, le=100)
    """Starting logit scale, the inverse temperature. 30 suits Lion (method of open_clip PR 432).
    A model to start from brings its own."""
    init_logit_bias: float | None = None
    """Starting logit bias for sigmoid losses, -10 in SigLIP; none for softmax losses."""
    freeze: FreezeConfig = FreezeConfig()
    gradient_checkpointing: bool = False
    """Compute the towers' blocks twice rather than keep what is between them: less memory."""

    @model_validator(mode="after")
    def _towers_are_known(self) -> "DualEncoderConfig":
        if self.start is None and (self.image is None or self.text is None):
            missing = "image" if self.image is None else "text"
            message = f"give the {missing} tower, or a model to start from"
            raise ValueError(message)
        return self

    def open_clip_config(self, *, image_size: int, context_length: int) -> dict[str, Any]:
        """The `model_cfg` from which open_clip builds this very model.

        Raises:
            ConfigError: If a checkpoint that it names cannot be found, or towers do not go
                together.
        """
        given: dict[str, Any] = {}
        if self.start is not None and (self.image is None or self.text is None):
            given = find_checkpoint(self.start).model_config
        vision = given["vision_cfg"] if self.image is None else self.image.open_clip_config()
        text = given["text_cfg"] if self.text is None else self.text.open_clip_config()
        config: dict[str, Any] = {
            "embed_dim": self._width(given),
            "vision_cfg": {**vision, "image_size": image_size},
            "text_cfg": {**text, "context_length": context_length},
            "custom_text": True,
            "init_logit_scale": math.log(self.init_logit_scale),
        }
        if self._quick_gelu(given):
            config["quick_gelu"] = True
        if self.init_logit_bias is not None:
            config["init_logit_bias"] = self.init_logit_bias
        return config

    def _width(self, given: dict[str, Any]) -> int:
        theirs = given.get("embed_dim", self.dim or _DIM)
        if self.dim not in (None, theirs):
            message = f"model.dim={self.dim}: {self.start} has {theirs}; leave dim out"
            raise ConfigError(message)
        return int(theirs)

    def _quick_gelu(self, given: dict[str, Any]) -> bool:
        """open_clip has one switch for both towers."""
        theirs = bool(given.get("quick_gelu", False))
        wanted = {
            theirs if tower is None else tower.quick_gelu for tower in (self.image, self.text)
        } - {None}
        if len(wanted) > 1:
            message = (
                "model: one tower computes with quick_gelu and the other without, which open_clip "
                "cannot express; take both from models of one kind, e.g. ViT-B-32-quickgelu"
            )
            raise ConfigError(message)
        return True in wanted


def unit_rows(features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    """Rows of length 1, in float32 at least: in bfloat16 a length of 1 would be off by 0.4%."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


class DualEncoder(nn.Module):
    """Unit embeddings of images and captions in one space.

    Args:
        open_clip_config: A `model_cfg` mapping as in open_clip's model files.
    """

    def __init__(self, open_clip_config: dict[str, Any]) -> None:
        super().__init__()
        clip = _open_clip_model(open_clip_config)
        self.image: nn.Module = clip.visual
        self.text: nn.Module = clip.text
        read_out_one_position(self.image)
        read_out_one_position(self.text)
        self.log_logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(1).clone())
        bias = clip.logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(bias.detach().reshape(1).clone())

    def train(self, mode: bool = True) -> "DualEncoder":
        """As of any module, but what is frozen stays in evaluation mode."""
        super().train(mode)
        evaluate_frozen(self)
        return self

    def forward(
        self,
        images: Float[Tensor, "batch channel height width"],
        token_ids: Int64[Tensor, "batch token"],
        *more_views: Float[Tensor, "batch channel _ _"],
    ) -> DualEncoderOutput:
        """Embed images, captions, and further views of the same images, of any size each."""
        image, *others = self._encode_views([images, *more_views])
        return DualEncoderOutput(
            image=image,
            text=self.encode_text(token_ids),
            logit_scale=self.logit_scale(),
            logit_bias=self.logit_bias,
            more_images=tuple(others),
        )

    def _encode_views(self, views: list[Tensor]) -> list[Tensor]:
        """Embeddings of each view; neighbours of one size go through the tower together."""
        rows: list[Tensor] = []
        for _, group in itertools.groupby(views, key=lambda view: view.shape):
            alike = list(group)
            parts = self.encode_image(torch.cat(alike)).chunk(len(alike))
            rows += [part.clone() for part in parts]  # FSDP2 warns of outputs that are views
        return rows

    def encode_image(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch dim"]:
        """Unit float32 embeddings of normalised images."""
        return unit_rows(self.image(images))

    def encode_text(self, token_ids: Int64[Tensor, "batch token"]) -> Float[Tensor, "batch dim"]:
        """Unit float32 embeddings of tokenized captions; trimmed padding changes nothing."""
        return unit_rows(_text_features(self.text, token_ids))

    @property
    def vocab_size(self) -> int:
        """Token ids that the text tower knows."""
        return int(self.text.vocab_size)  # type: ignore[arg-type] # nn.Module hides it

    def logit_scale(self) -> Float[Tensor, "1"]:
        """The multiplier of cosines, in [1, 100].

        Clamped here too, not only after the optimizer step: sharded optimizers keep a master copy
        that an in-place clamp does not reach.
        """
        return self.log_logit_scale.clamp(0.0, MAX_LOG_LOGIT_SCALE).exp()

    def open_clip_state(self) -> dict[str, Tensor]:
        """The weights under the names that open_clip's `CustomTextCLIP` gives them."""
        state = {"logit_scale": self.log_logit_scale.detach().clamp(0.0, MAX_LOG_LOGIT_SCALE)[0]}
        if self.logit_bias is not None:
            state["logit_bias"] = self.logit_bias.detach()[0]
        for name, tensor in self.state_dict().items():
            for ours, theirs in _PREFIXES.items():
                if name.startswith(ours):
                    state[theirs + name.removeprefix(ours)] = tensor
        return state

    def load_open_clip_state(self, state: dict[str, Tensor]) -> None:
        """Load weights under open_clip's names.

        Raises:
            RuntimeError: If a tensor is missing, unexpected or of another shape; all are listed.
        """
        renamed = {}
        for name, tensor in state.items():
            if name == "logit_scale":
                renamed["log_logit_scale"] = tensor.reshape(1)
            elif name == "logit_bias":
                renamed["logit_bias"] = tensor.reshape(1)
            else:
                ours, theirs = next(
                    ((o, t) for o, t in _PREFIXES.items() if name.startswith(t)), ("", "")
                )
                renamed[ours + name.removeprefix(theirs)] = tensor
        self.load_state_dict(renamed)


def _open_clip_model(config: dict[str, Any]) -> Any:
    """open_clip's model, whose image tower reads images of the configured size.

    Raises:
        ConfigError: If a library or an architecture is not there, or widths do not agree.
    """
    from open_clip.model import CustomTextCLIP  # noqa: PLC0415 - seconds, only builders pay

    vision = config["vision_cfg"]
    try:
        clip = CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"})
    except (RuntimeError, KeyError, OSError) as error:
        # An unknown timm model, a text encoder without its library, or of a kind not known.
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        message = f"model: the towers cannot be built ({reason})"
        raise ConfigError(message) from error
    _check_positions(clip.text, config["text_cfg"])
    if "timm_model_name" not in vision:
        return clip
    trunk, size = clip.visual.trunk, vision["image_size"]
    if vision.get("timm_proj") == "none" and trunk.num_features != config["embed_dim"]:
        message = (
            f"model.dim={config['embed_dim']}: without a projection it must be the width of "
            f"{vision['timm_model_name']}, {trunk.num_features}"
        )
        raise ConfigError(message)
    if hasattr(trunk, "set_input_size") and trunk.default_cfg["input_size"][-1] != size:
        clip.visual.set_input_size(size)
    return clip


def _check_positions(tower: Any, text: dict[str, Any]) -> None:
    if "hf_model_name" not in text or not tower.context_length:
        return
    known = tower.context_length
    if "roberta" in tower.config.model_type:  # whose positions begin behind the padding id
        known -= tower.config.pad_token_id + 1
    if text["context_length"] > known:
        message = (
            f"tokenizer.context_length={text['context_length']}: {text['hf_model_name']} knows "
            f"{known} positions; lower it"
        )
        raise ConfigError(message)


def _text_features(tower: Any, token_ids: Int64[Tensor, "batch token"]) -> Tensor:
    """Run a text tower on token ids whose common padding may have been cut off.

    open_clip's transformer takes full-length input only. Where it is causal and read out at the
    end mark, nothing after the mark matters, so it is run here on the trimmed ids: the same
    numbers for a fraction of the work.
    """
    length = token_ids.shape[1]
    if hasattr(tower, "pooler"):  # of transformers: takes any length, and masks its own padding
        return tower(token_ids)
    if not reads_end_mark(tower):
        missing = tower.context_length - length if hasattr(tower, "context_length") else 0
        return tower(F.pad(token_ids, (0, missing)))
    hidden = tower.token_embedding(token_ids) + tower.positional_embedding[:length]
    ends = token_ids.argmax(dim=1)  # the end mark has the highest id
    mask = tower.attn_mask[:length, :length]
    pooled = tower.ln_final(run_to_position(tower.transformer, hidden, mask, ends))
    if isinstance(tower.text_projection, nn.Linear):
        return tower.text_projection(pooled)
    return pooled if tower.text_projection is None else pooled @ tower.text_projection


@runtime_checkable
class HasLogitScale(Protocol):
    """A model that scales cosines."""

    log_logit_scale: nn.Parameter


def clamp_logit_scale(model: HasLogitScale) -> None:
    """Bring the learnt log logit scale back into [0, ln 100] after an optimizer step."""
    with torch.no_grad():
        model.log_logit_scale.clamp_(0.0, MAX_LOG_LOGIT_SCALE)


def set_logit_scale(model: HasLogitScale, scale: float) -> None:
    """Give the model this logit scale, in [1, 100], instead of one that it learns."""
    with torch.no_grad():
        model.log_logit_scale.fill_(math.log(scale)).clamp_(0.0, MAX_LOG_LOGIT_SCALE)
