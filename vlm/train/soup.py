"""Averages of weights: a soup of several models, or the way from a start model to a tuned one."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlm.errors import BundleError
from vlm.inference import BundleInfo
from vlm.train.derive import Origin, load_origin, require_free, save_derived

__all__ = ["average_states", "make_soup"]


def make_soup(
    models: Sequence[Path], folder: Path, *, alpha: float | None, shards: list[Path]
) -> BundleInfo:
    """Average the weights of models of one architecture and write the bundle of the result.

    Args:
        models: At least two bundles, runs or checkpoints.
        folder: Of the new bundle.
        alpha: None for the uniform average (model soups, arXiv:2203.05482). Else there are two
            models, a start and a tuned one, and the result is (1 - alpha) start + alpha tuned
            (WiSE-FT, arXiv:2109.01903).
        shards: Datasets whose pairs decide the modality means; without, the bundle has none.

    Raises:
        BundleError: If there are too few or too many models, or they do not fit together.
        CheckpointError: If a run has no checkpoint.
        DataError: If the shards cannot be read.
    """
    if len(models) < 2 or (alpha is not None and len(models) != 2):
        wanted = "two or more models" if alpha is None else "exactly two, start and tuned"
        message = f"a soup with alpha={alpha} needs {wanted}, got {len(models)}"
        raise BundleError(message)
    require_free(folder)
    origins = [load_origin(path) for path in models]
    first = origins[0]
    for other in origins[1:]:
        _check_alike(first, other)
    weights = [1 / len(origins)] * len(origins) if alpha is None else [1 - alpha, alpha]
    states = [origin.bundle.model.state_dict() for origin in origins]
    first.bundle.model.load_state_dict(average_states(states, weights))
    infos = [origin.bundle.info for origin in origins]
    return save_derived(
        folder,
        first.bundle.model,
        first,
        name=f"soup of {', '.join(dict.fromkeys(info.name for info in infos))}",
        provenance={
            "soup": [
                {"fingerprint": info.fingerprint, "weight": weight}
                for info, weight in zip(infos, weights, strict=True)
            ]
        },
        shards=shards,
    )


def average_states(
    states: Sequence[dict[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """The weighted sum of each tensor, taken in float64; counters come from the first state."""
    averaged = {}
    for name, tensor in states[0].items():
        if not tensor.is_floating_point():
            averaged[name] = tensor
            continue
        total = torch.zeros_like(tensor, dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            total += weight * state[name].double()
        averaged[name] = total.to(tensor.dtype)
    return averaged


def _check_alike(first: Origin, other: Origin) -> None:
    """Weights mean the same only in one architecture, over the same pixels and tokens."""
    ours, theirs = first.bundle.model.state_dict(), other.bundle.model.state_dict()
    shapes = [{name: tuple(t.shape) for name, t in state.items()} for state in (ours, theirs)]
    differing = sorted(
        name
        for name in shapes[0].keys() | shapes[1].keys()
        if shapes[0].get(name) != shapes[1].get(name)
    )
    if differing:
        message = (
            f"{other.path} is of another architecture than {first.path}: {len(differing)} weights "
            f"differ, first {differing[0]!r}; only weights of one architecture can be averaged"
        )
        raise BundleError(message)
    for what in ("image", "tokenizer"):
        # Where a tokenizer lies is no matter.
        mine, their = (
            getattr(origin.bundle.info, what).model_dump(exclude={"source"})
            for origin in (first, other)
        )
        if mine != their:
            message = (
                f"{other.path} and {first.path} differ in their {what} settings: {their} and {mine}"
            )
            raise BundleError(message)
