"""Which models there are, and how a configuration becomes one."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from vlm.models.coca import CoCa, CocaConfig
from vlm.models.dual_encoder import DualEncoder, DualEncoderConfig

__all__ = ["Model", "ModelConfig", "build_model"]

Model = DualEncoder | CoCa


def _kind(tree: Any) -> Any:
    """The `type` of a model section, which may be left out for a dual encoder."""
    if isinstance(tree, dict):
        return tree.get("type", "dual_encoder")
    return getattr(tree, "type", None)


ModelConfig = Annotated[
    Annotated[DualEncoderConfig, Tag("dual_encoder")] | Annotated[CocaConfig, Tag("coca")],
    Discriminator(_kind),
]


def build_model(
    config: DualEncoderConfig | CocaConfig, *, image_size: int, context_length: int
) -> Model:
    """The model with fresh weights, drawn from torch's own generator."""
    if isinstance(config, CocaConfig):
        return CoCa(config, image_size=image_size, context_length=context_length)
    return DualEncoder(
        config.open_clip_config(image_size=image_size, context_length=context_length)
    )
