"""Which parameters decay, how fast each learns, and which are scalars with a rule of their own."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

__all__ = ["parameter_groups"]

_SCALARS = ("log_logit_scale", "logit_bias")
_NEVER_DECAYED = {
    "positional_embedding",
    "class_embedding",
    "query_embedding",
    "token_embedding",
    "pos_embed",
    "cls_token",
    "cls_emb",
    "vocabulary",
    # Transformers' names.
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "relative_attention_bias",
}
_HEADS = {"proj", "head", "text_projection", "image_projection"}
_TOWERS = ("image", "text")


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    scalar_lr: float,
    betas: tuple[float, float],
    lr_factors: dict[str, float] | None = None,
    layer_decay: float | None = None,
    depth: Callable[[str], int | None] | None = None,
) -> list[dict[str, Any]]:
    """Groups by what a parameter is (`hidden`, `decay`, `no_decay`, `scalars`) and by its rate.

    Weight decay is for matrices and filters alone, not for norms, biases, scales, and embeddings
    of tokens, positions and classes. `hidden` are the decayed matrices between the embeddings and
    the projections into the shared space. The logit scale and bias take AdamW's rule at `scalar_lr`
    without decay, whatever optimizer the rest takes (`rule` is read by `vlm.optim.Lion`).

    Args:
        named_parameters: Those of the model; the first word of a name is its tower. Frozen ones
            are left out.
        lr: Peak rate.
        weight_decay: Of matrices and filters.
        scalar_lr: Peak rate of the logit scale and bias.
        betas: Of all groups but `scalars`.
        lr_factors: For each of the towers `image` and `text`, how many times `lr`.
        layer_decay: The rate of a layer as a multiple of the one above it in its tower.
        depth: How many layers lie between the input of its tower and a parameter, or none behind
            the last layer; needed for `layer_decay`.

    Raises:
        ValueError: If `layer_decay` is given without `depth`.
    """
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    factors = _factors([name for name, _ in trainable], lr_factors or {}, layer_decay, depth)
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    # In this order, so that an optimizer's state does not depend on the order of modules.
    for kind in ("hidden", "decay", "no_decay", "scalars"):
        for name, parameter in trainable:
            if _kind(name, parameter) != kind:
                continue
            factor = 1.0 if kind == "scalars" else factors[name]
            key = (kind, factor)
            if key not in groups:
                groups[key] = {
                    "name": kind if factor == 1 else f"{kind} x {factor:.4g}",
                    "params": [],
                    "lr": lr * factor,
                    "betas": betas,
                    "weight_decay": weight_decay if kind in ("hidden", "decay") else 0.0,
                    "hidden": kind == "hidden",
                }
                if kind == "scalars":
                    groups[key] |= {"lr": scalar_lr, "betas": (0.9, 0.98), "rule": "adamw"}
            groups[key]["params"].append(parameter)
    return list(groups.values())


def _kind(name: str, parameter: nn.Parameter) -> str:
    words = name.split(".")
    if words[-1] in _SCALARS:
        return "scalars"
    if parameter.ndim < 2 or not _NEVER_DECAYED.isdisjoint(words):
        return "no_decay"
    # A bare `proj` is a tower's last; one with a weight sits in a block or in the first layer.
    if parameter.ndim > 2 or words[-1] in _HEADS or not (_HEADS - {"proj"}).isdisjoint(words):
        return "decay"
    return "hidden"


def _factors(
    names: list[str],
    lr_factors: dict[str, float],
    layer_decay: float | None,
    depth: Callable[[str], int | None] | None,
) -> dict[str, float]:
    """Each parameter's rate as a multiple of the peak."""
    factors = {name: lr_factors.get(_tower(name), 1.0) for name in names}
    if layer_decay is None:
        return factors
    if depth is None:
        message = "layer_decay needs the depth of every parameter"
        raise ValueError(message)
    depths = {name: depth(name) for name in names}
    top: dict[str, int] = {}  # of what is behind the last layer
    for name in names:
        top[_tower(name)] = max(top.get(_tower(name), 0), (depths[name] or 0) + 1)
    below = {}
    for name, depth_of in depths.items():
        below[name] = 0 if depth_of is None else top[_tower(name)] - depth_of
    return {name: factor * layer_decay ** below[name] for name, factor in factors.items()}


def _tower(name: str) -> str:
    """The tower of a parameter, or an empty word outside both."""
    first = name.partition(".")[0]
    return next((t for t in _TOWERS if first == t or first == f"{t}_projection"), "")
