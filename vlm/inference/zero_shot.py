"""Zero-shot classification: class names become vectors, cosines become probabilities."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

__all__ = [
    "class_embeddings",
    "exclusive_probabilities",
    "fill_templates",
    "independent_probabilities",
    "normalised",
]

EncodeTexts = Callable[[Sequence[str]], Float[np.ndarray, "batch dim"]]


def fill_templates(label: str, templates: Sequence[str]) -> list[str]:
    """The prompts of one class: `{}` in each template stands for the label.

    Raises:
        ValueError: If there is no template, or one lacks the place for the label.
    """
    if not templates:
        message = "at least one template is needed, e.g. 'a photo of a {}'"
        raise ValueError(message)
    for template in templates:
        if "{}" not in template:
            message = f"template {template!r} has no {{}} where the label goes"
            raise ValueError(message)
    return [template.replace("{}", label) for template in templates]


def class_embeddings(
    encode_texts: EncodeTexts, prompts_of_classes: Sequence[Sequence[str]]
) -> Float[np.ndarray, "class dim"]:
    """One unit row a class: the renormalised mean of its unit prompt embeddings.

    Args:
        encode_texts: Captions to unit rows.
        prompts_of_classes: For each class its prompts, at least one; see `fill_templates`.

    Source: prompt ensembling of CLIP, section 3.1.4 (arXiv:2103.00020).
    """
    flat = [prompt for prompts in prompts_of_classes for prompt in prompts]
    rows = encode_texts(flat)
    ends = np.cumsum([len(prompts) for prompts in prompts_of_classes])
    means = np.stack([part.mean(axis=0) for part in np.split(rows, ends[:-1])])
    return normalised(means)


def exclusive_probabilities(
    cosines: Float[np.ndarray, "batch class"], logit_scale: float
) -> Float[np.ndarray, "batch class"]:
    """Softmax over classes of `logit_scale` times cosine: exactly one class holds."""
    logits = logit_scale * cosines.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    weights = np.exp(logits)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def independent_probabilities(
    cosines: Float[np.ndarray, "batch class"], logit_scale: float, logit_bias: float
) -> Float[np.ndarray, "batch class"]:
    """Sigmoid of scaled and shifted cosines: any number of classes may hold.

    Calibrated only for models trained with a sigmoid loss, which learn the bias
    (SigLIP, arXiv:2303.15343).
    """
    logits = logit_scale * cosines.astype(np.float64) + logit_bias
    return (0.5 * (1 + np.tanh(logits / 2))).astype(np.float32)


def normalised(rows: Float[np.ndarray, "batch dim"]) -> Float[np.ndarray, "batch dim"]:
    """Rows scaled to unit length; a row of zeros stays zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.maximum(lengths, 1e-12)).astype(np.float32)
