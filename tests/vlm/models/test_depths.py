"""Depths of parameters, over the names of models as they are built."""

from typing import Any

import pytest
import torch

from tests.support import TINY_COCA, TINY_MODEL
from vlm.models import CoCa, CocaConfig, DualEncoder, DualEncoderConfig
from vlm.models.depths import parameter_depth, parameter_depths


def depths_of(**changes: Any) -> dict[str, int | None]:
    config = DualEncoderConfig.model_validate({**TINY_MODEL, **changes})
    with torch.device("meta"):
        model = DualEncoder(config.open_clip_config(image_size=32, context_length=8))
    return parameter_depths(name for name, _ in model.named_parameters())


def deepest(depths: dict[str, int | None], tower: str) -> int:
    return max(d for name, d in depths.items() if name.startswith(tower) and d is not None)


def test_embeddings_are_the_stem_and_blocks_count_from_one() -> None:
    depths = depths_of(
        image={**TINY_MODEL["image"], "layers": 3}, text={**TINY_MODEL["text"], "layers": 2}
    )
    assert (deepest(depths, "image."), deepest(depths, "text.")) == (3, 2)
    stem = {name for name, depth in depths.items() if depth == 0}
    assert stem == {
        "image.class_embedding", "image.positional_embedding", "image.conv1.weight",
        "image.ln_pre.weight", "image.ln_pre.bias",
        "text.positional_embedding", "text.token_embedding.weight",
    }  # fmt: skip
    behind = {name for name, depth in depths.items() if depth is None}
    assert behind == {
        "image.ln_post.weight", "image.ln_post.bias", "image.proj", "text.text_projection",
        "text.ln_final.weight", "text.ln_final.bias", "log_logit_scale",
    }  # fmt: skip
    assert depths["image.transformer.resblocks.2.mlp.c_fc.weight"] == 3


@pytest.mark.parametrize(
    ("tower", "stem", "stages", "behind"),
    [
        ({"type": "resnet", "layers": [1, 2, 1, 1], "width": 8, "head_width": 8},
         "image.bn3.bias", 4, "image.attnpool.positional_embedding"),
        ({"type": "timm", "name": "resnet10t"}, "image.trunk.conv1.0.weight", 4,
         "image.head.proj.weight"),
        ({"type": "timm", "name": "efficientnet_b0"}, "image.trunk.bn1.bias", 7,
         "image.trunk.bn2.bias"),
        ({"type": "timm", "name": "convnext_atto"}, "image.trunk.stem.1.bias", 4,
         "image.trunk.head.norm.weight"),
        ({"type": "timm", "name": "test_vit"}, "image.trunk.cls_token", 6,
         "image.trunk.norm.weight"),
    ],
)  # fmt: skip
def test_networks_of_stages_count_their_stages(
    tower: dict[str, Any], stem: str, stages: int, behind: str
) -> None:
    depths = depths_of(image=tower)
    assert depths[stem] == 0
    assert deepest(depths, "image.") == stages
    assert depths[behind] is None


def test_the_second_half_of_a_decoder_lies_behind_the_first() -> None:
    with torch.device("meta"):
        coca = CoCa(CocaConfig.model_validate(TINY_COCA), image_size=32, context_length=8)
    depths = parameter_depths(name for name, _ in coca.named_parameters())
    assert depths["text.unimodal.0.norm.weight"] == 1
    assert depths["text.multimodal.0.norm.weight"] == 2
    assert depths["text.multimodal.1.norm.weight"] == 3
    assert depths["text.vocabulary"] is depths["caption_pooler.norm.weight"] is None
    assert depths["image.blocks.0.norm.weight"] == 1


def test_text_encoders_of_transformers_are_known_by_name() -> None:
    assert parameter_depth("text.transformer.embeddings.word_embeddings.weight") == 0
    assert parameter_depth("text.transformer.encoder.layer.5.attention.self.query.weight") == 6
    assert parameter_depth("text.transformer.pooler.dense.weight") is None
    assert parameter_depth("text.proj.weight") is None
