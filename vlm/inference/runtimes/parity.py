"""The gate: how far a runtime strays from torch in fp32, and how far it may."""

from typing import Final

import numpy as np
from pydantic import Field

from vlm.config import Config
from vlm.inference.runtimes.calibration import Calibration
from vlm.inference.runtimes.protocol import Rows, Runtime
from vlm.preprocess import HuggingFaceTokenizerConfig, TokenizerConfig

__all__ = ["MIN_COSINE", "MIN_TOP1_AGREEMENT", "Parity", "compare_rows", "measure_parity"]

MIN_COSINE: Final = 0.999
MIN_TOP1_AGREEMENT: Final = 0.995
_TIE: Final = 1e-6
_BATCH: Final = 16


class Parity(Config):
    """What a comparison found. Not-a-number never passes."""

    image_cosine: float
    """Mean cosine between a runtime's image rows and the reference's."""
    text_cosine: float
    top1_agreement: float
    """Fraction of images whose best text, and of texts whose best image, is the same."""
    num_pairs: int = Field(ge=1)
    calibration: str
    """Where the pairs came from."""

    @property
    def shortfall(self) -> str | None:
        """What strays and by how much, or none if the runtime passes."""
        parts = [
            f"mean cosine of {what} {found:.5f}, at least {MIN_COSINE} is needed"
            for what, found in (("images", self.image_cosine), ("texts", self.text_cosine))
            if not found >= MIN_COSINE
        ]
        if not self.top1_agreement >= MIN_TOP1_AGREEMENT:
            parts.append(
                f"top-1 agreement {self.top1_agreement:.2%}, at least "
                f"{MIN_TOP1_AGREEMENT:.1%} is needed"
            )
        return f"{'; '.join(parts)} (over {self.calibration})" if parts else None


def measure_parity(
    runtime: Runtime,
    reference: Runtime,
    calibration: Calibration,
    tokenizer: TokenizerConfig | HuggingFaceTokenizerConfig,
) -> Parity:
    """Run both on the same pairs, in batches that differ in size and length, and compare."""
    found, expected = (embed_pairs(r, calibration, tokenizer) for r in (runtime, reference))
    return compare_rows(found, expected, origin=calibration.origin)


def embed_pairs(
    runtime: Runtime,
    calibration: Calibration,
    tokenizer: TokenizerConfig | HuggingFaceTokenizerConfig,
) -> tuple[Rows, Rows]:
    """Image rows and text rows of all pairs, one of each in a batch of its own."""
    pixels = calibration.pixel_batches(batch=_BATCH)
    token_ids = calibration.token_ids(tokenizer, batch=_BATCH)
    pixels = [pixels[0][:1], pixels[0][1:], *pixels[1:]]
    token_ids = [token_ids[0][:1], token_ids[0][1:], *token_ids[1:]]
    return (
        np.concatenate([runtime.image_rows(batch) for batch in pixels if len(batch)]),
        np.concatenate([runtime.text_rows(batch) for batch in token_ids if len(batch)]),
    )


def compare_rows(found: tuple[Rows, Rows], expected: tuple[Rows, Rows], *, origin: str) -> Parity:
    """Compare image rows and text rows of one runtime with those of the reference."""
    images, texts = expected
    cosines = images @ texts.T  # [image text]
    other = found[0] @ found[1].T
    same = np.concatenate([_same_best(cosines, other), _same_best(cosines.T, other.T)])
    return Parity(
        image_cosine=_mean_cosine(found[0], images),
        text_cosine=_mean_cosine(found[1], texts),
        top1_agreement=float(same.mean()),
        num_pairs=len(images),
        calibration=origin,
    )


def _same_best(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """For each row whether the best column is the expected one, or one exactly as good."""
    picked = expected[np.arange(len(expected)), found.argmax(axis=1)]
    return (picked >= expected.max(axis=1) - _TIE) & np.isfinite(found).all(axis=1)


def _mean_cosine(found: Rows, expected: Rows) -> float:
    return float((found.astype(np.float64) * expected).sum(axis=1).mean())
