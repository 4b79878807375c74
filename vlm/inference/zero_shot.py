"""Zero-shot classification: class names become vectors, cosines become probabilities."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from jaxtyping import Float

__all__ = [
    "NAMED_TEMPLATES",
    "class_embeddings",
    "doubled_label",
    "exclusive_probabilities",
    "expanded_templates",
    "fill_templates",
    "independent_probabilities",
    "normalised",
]

NAMED_TEMPLATES: Final[Mapping[str, Sequence[str]]] = {
    "plain": ("{}",),
    "photo": ("a photo of a {}", "a cropped photo of a {}", "a good photo of a {}", "a {}"),
    "drawing": ("a drawing of a {}", "an icon of a {}", "an emoji of a {}", "a {}"),
}
"""What a template may be besides a text with `{}`: the name of several."""

EncodeTexts = Callable[[Sequence[str]], Float[np.ndarray, "batch dim"]]


def expanded_templates(templates: Sequence[str]) -> list[str]:
    """Names of `NAMED_TEMPLATES` replaced by what they stand for."""
    return [text for name in templates for text in NAMED_TEMPLATES.get(name, (name,))]


def doubled_label(labels: Sequence[str]) -> str | None:
    """The first label in the alphabet that is given twice, if any is.

    Blanks and the form of Unicode make no difference, as they make none to a tokenizer.
    """
    seen = Counter(unicodedata.normalize("NFC", " ".join(label.split())) for label in labels)
    return min((label for label, count in seen.items() if count > 1), default=None)


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
