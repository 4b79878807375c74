"""Towers: what can be put behind each modality, and how open_clip spells it.

Every tower here is one that open_clip builds from its `model_cfg`, so that whatever is trained can
be opened by plain open_clip. A new tower is a new class with what `Tower` asks for, and one more
member of the unions below.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import Field, Tag, model_validator
from torch import Tensor

from vlm.config import Config, type_or
from vlm.models.checkpoints import timm_weights
from vlm.models.huggingface_tower import HuggingFaceTower
from vlm.models.open_clip_towers import OpenClipImageTower, OpenClipTextTower

__all__ = [
    "ImageTower",
    "ResNetTower",
    "TextTower",
    "TextTransformerTower",
    "TimmTower",
    "Tower",
    "VisionTransformerTower",
]


@runtime_checkable
class Tower(Protocol):
    """What every member of the unions below can say of itself."""

    @property
    def quick_gelu(self) -> bool | None:
        """Whether it computes with OpenAI's approximation of GELU; none: it does not matter."""

    def open_clip_config(self) -> dict[str, Any]:
        """Its half of open_clip's `model_cfg`, which downloads nothing."""

    def initial_weights(self) -> dict[str, Tensor] | None:
        """What it starts from, named as in the tower's own module; none: fresh weights.

        Raises:
            ConfigError: If the weights cannot be had.
        """


class _OwnTower(Config):
    """A tower without weights to start from."""

    @property
    def quick_gelu(self) -> bool | None:
        return False

    def initial_weights(self) -> dict[str, Tensor] | None:
        return None


class VisionTransformerTower(_OwnTower):
    """Vision transformer with a class token (arXiv:2010.11929), as in CLIP."""

    type: Literal["vit"] = "vit"
    width: int = Field(768, ge=8)
    layers: int = Field(12, ge=1)
    head_width: int = Field(64, ge=4)
    patch_size: int = Field(32, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    patch_dropout: float = Field(0.0, ge=0, lt=1)
    """Fraction of patches dropped in training (FLIP, arXiv:2212.00794)."""

    @model_validator(mode="after")
    def _has_heads(self) -> "VisionTransformerTower":
        heads = self.width // self.head_width
        if not heads or self.width % heads:
            message = (
                f"width={self.width} cannot be shared among heads of head_width={self.head_width}: "
                f"make the width a multiple of it"
            )
            raise ValueError(message)
        return self

    def open_clip_config(self) -> dict[str, Any]:
        return self.model_dump(exclude={"type"})


class ResNetTower(_OwnTower):
    """CLIP's modified ResNet: three-convolution stem, blur-free pooling strides, attention pool.

    Cheap on small images and stronger than a transformer when pairs are few. Source: section 2.4
    of CLIP (arXiv:2103.00020).
    """

    type: Literal["resnet"] = "resnet"
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    width: int = Field(64, ge=2)
    """Channels of the first stage; the last has 32 times as many."""
    head_width: int = Field(64, ge=4)

    @property
    def quick_gelu(self) -> bool | None:
        return None  # it has ReLU alone

    def open_clip_config(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "width": self.width, "head_width": self.head_width}


class TimmTower(Config):
    """Any image model that timm knows by name, without pretrained weights unless asked for."""

    type: Literal["timm"] = "timm"
    name: str
    """As in `timm.list_models()`."""
    pretrained: bool = False
    """Start from timm's weights; needs a model hub or its local cache."""
    weights: Path | None = None
    """Start from this file of timm's weights for the model: .safetensors, or .pth of tensors."""
    pool: str = "avg"
    """How places become one row: avg, max, or what the model has, e.g. token or map."""
    projection: Literal["linear", "mlp", "none"] = "linear"
    """From there to the shared space; `none` for models whose own width it is, as SigLIP's."""
    drop_path: float | None = Field(None, ge=0, lt=1)
    patch_dropout: float = Field(0.0, ge=0, lt=1)
    """Fraction of patches dropped in training (FLIP, arXiv:2212.00794), of models with patches."""

    @model_validator(mode="after")
    def _one_start(self) -> "TimmTower":
        if self.pretrained and self.weights is not None:
            message = "give pretrained or weights, not both"
            raise ValueError(message)
        return self

    @property
    def quick_gelu(self) -> bool | None:
        return None

    def open_clip_config(self) -> dict[str, Any]:
        config = {
            "timm_model_name": self.name,
            "timm_model_pretrained": False,
            "timm_pool": self.pool,
            "timm_proj": self.projection,
            "timm_drop_path": self.drop_path,
        }
        return config | ({"patch_dropout": self.patch_dropout} if self.patch_dropout else {})

    def initial_weights(self) -> dict[str, Tensor] | None:
        if not self.pretrained and self.weights is None:
            return None
        found = timm_weights(self.name, self.weights)
        return {f"trunk.{name}": tensor for name, tensor in found.items()}


class TextTransformerTower(_OwnTower):
    """Text transformer; as it stands CLIP's, causal and read out at the end mark.

    Sources: CLIP (arXiv:2103.00020); SigLIP (arXiv:2303.15343), as open_clip's `ViT-B-16-SigLIP`
    spells it, has `causal: false`, `pool: last`, `projection_bias: true` and `norm_eps: 1e-6`.
    """

    type: Literal["transformer"] = "transformer"
    width: int = Field(512, ge=8)
    layers: int = Field(12, ge=1)
    heads: int = Field(8, ge=1)
    vocab_size: int = Field(49408, ge=3)
    causal: bool = True
    pool: Literal["end", "last", "first"] = "end"
    """The position read out: the end mark, the highest id; the last, padding or not; the first."""
    projection_bias: bool = False
    norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _has_heads(self) -> "TextTransformerTower":
        if self.width % self.heads:
            message = f"width={self.width} cannot be shared among heads={self.heads}"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _sees_what_it_reads(self) -> "TextTransformerTower":
        if self.causal and self.pool == "first":
            message = "pool=first: a causal transformer's first position has seen nothing"
            raise ValueError(message)
        return self

    def open_clip_config(self) -> dict[str, Any]:
        config = self.model_dump(include={"width", "layers", "heads", "vocab_size"})
        if not self.causal:
            config["no_causal_mask"] = True
        if self.pool != "end":
            config["pool_type"] = self.pool
        if self.projection_bias:
            config["proj_bias"] = True
        if self.norm_eps != 1e-5:
            config["norm_kwargs"] = {"eps": self.norm_eps}
        return config


ImageTower = Annotated[
    VisionTransformerTower | ResNetTower | TimmTower | OpenClipImageTower,
    Field(discriminator="type"),
]
TextTower = Annotated[
    Annotated[TextTransformerTower, Tag("transformer")]
    | Annotated[HuggingFaceTower, Tag("huggingface")]
    | Annotated[OpenClipTextTower, Tag("open_clip")],
    type_or("transformer"),
]
