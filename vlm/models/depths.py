"""How deep in its tower a parameter lies, told by its name alone.

For whatever treats early layers unlike late ones: layer-wise decay of learning rates, unlocking the
last blocks of a frozen tower. The names are those of `model.named_parameters()`.
"""

import re
from collections.abc import Iterable

__all__ = ["parameter_depth", "parameter_depths"]

# The first list of blocks in a name counts: `stages.2.blocks.5` lies in stage 2.
_BLOCK = re.compile(
    r"\.(?:resblocks|blocks|stages|layers|layer|block|unimodal|multimodal)\.(\d+)\."
)
_STAGE = re.compile(r"\.layer(\d)\.")  # of ResNets, which count from 1
_STEM = re.compile(
    r"""^(?:image|text)\.
        (?:(?:conv[123]|bn[123])\.                                 # stem of CLIP's ResNet
          |(?:trunk\.|transformer\.)?
           (?:conv1|bn1|conv_stem|stem|patch_embed|patches|embeddings|embed_tokens|shared
             |token_embedding|positional_embedding|pos_embed|class_embedding|cls_token|reg_token
             |ln_pre|norm_pre)(?:\.|$))""",
    re.VERBOSE,
)
_MULTIMODAL = "text.multimodal."


def parameter_depth(name: str) -> int | None:
    """The depth of a parameter in its tower, `image` or `text`.

    0 is the stem and the embeddings of tokens, patches, positions and classes; 1, 2, … are the
    transformer's blocks, or the stages of a network that has stages. None is what lies behind the
    last block or in no tower: final norms, pooling, projections, the logit scale and bias.

    The second half of a CoCa's decoder is counted from 1 here, as its name is; `parameter_depths`,
    which sees the first half, puts it behind that.
    """
    found = _BLOCK.search(name)
    if found:
        return int(found[1]) + 1
    found = _STAGE.search(name)
    if found:
        return int(found[1])
    return 0 if _STEM.match(name) else None


def parameter_depths(names: Iterable[str]) -> dict[str, int | None]:
    """`parameter_depth` of all parameters of one model, which are thus ordered within a tower."""
    depths = {name: parameter_depth(name) for name in names}
    first_half = [depth or 0 for name, depth in depths.items() if name.startswith("text.unimodal.")]
    offset = max(first_half, default=0)
    return {
        name: depth + offset if depth is not None and name.startswith(_MULTIMODAL) else depth
        for name, depth in depths.items()
    }
