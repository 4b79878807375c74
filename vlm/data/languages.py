"""Which language a caption is in, as far as its few words tell."""

import functools
from typing import Any, Final

__all__ = ["UNSURE", "language_of"]

UNSURE: Final = "unsure"
_LEAST_PROBABILITY: Final = 0.8


def language_of(text: str) -> str:
    """ISO 639-1 code of the likeliest language, or `unsure`, as for most labels of two words."""
    code, probability = _identifier().classify(text)
    return str(code) if probability >= _LEAST_PROBABILITY else UNSURE


@functools.lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # noqa: PLC0415 - loads a model

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
