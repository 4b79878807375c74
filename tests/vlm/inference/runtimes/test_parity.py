import numpy as np
import pytest

from tests.support import unit_rows
from vlm.inference.runtimes.parity import Parity, compare_rows


def rows(count: int, dim: int, *, seed: int) -> np.ndarray:
    return unit_rows(count, dim, seed=seed).float().numpy()


def turned(unit: np.ndarray, cosine: float) -> np.ndarray:
    """The same rows in two more dimensions, each at that cosine to its original."""
    sine = np.sqrt(1 - cosine**2)
    return np.concatenate([cosine * unit, np.full((len(unit), 1), sine)], axis=1).astype(np.float32)


def widened(unit: np.ndarray) -> np.ndarray:
    return np.concatenate([unit, np.zeros((len(unit), 1))], axis=1).astype(np.float32)


def compared(found: tuple[np.ndarray, np.ndarray], pair: tuple[np.ndarray, np.ndarray]) -> Parity:
    return compare_rows(found, pair, origin="test pairs")


def test_a_runtime_equals_itself() -> None:
    pair = rows(50, 8, seed=0), rows(50, 8, seed=1)
    parity = compared(pair, pair)
    assert parity.image_cosine == pytest.approx(1, abs=1e-6)
    assert parity.top1_agreement == 1
    assert parity.shortfall is None


@pytest.mark.parametrize(("cosine", "passes"), [(0.9991, True), (0.9989, False)])
def test_the_gate_closes_at_a_mean_cosine_of_0_999(cosine: float, passes: bool) -> None:
    images, texts = rows(50, 8, seed=0), rows(50, 8, seed=1)
    found = turned(images, cosine), widened(texts)  # all images turn alike: no order changes
    parity = compared(found, (widened(images), widened(texts)))
    assert parity.image_cosine == pytest.approx(cosine, abs=1e-6)
    assert parity.top1_agreement == 1
    assert (parity.shortfall is None) == passes
    if not passes:
        assert "mean cosine of images 0.99890, at least 0.999" in str(parity.shortfall)
        assert "texts" not in str(parity.shortfall)


@pytest.mark.parametrize(("wrong", "passes"), [(1, True), (2, False)])
def test_the_gate_closes_at_a_top1_agreement_of_99_5_percent(wrong: int, passes: bool) -> None:
    unit = np.eye(100, dtype=np.float32)  # image i is nearest to text i alone
    found = unit.copy()
    found[:wrong] = 0.9 * unit[50] + 0.1 * unit[:wrong]
    parity = compared((found, unit), (unit, unit))  # 100 images and 100 texts are asked
    assert parity.top1_agreement == pytest.approx(1 - wrong / 200)
    assert ("top-1 agreement" in str(parity.shortfall)) == (not passes)


def test_texts_that_are_exactly_as_good_are_the_same_answer() -> None:
    images = np.eye(4, dtype=np.float32)
    texts = np.eye(4, dtype=np.float32)
    texts[1] = texts[0]
    nudged = texts.copy()
    nudged[1] *= 1.001
    assert compared((images, nudged), (images, texts)).top1_agreement == 1


def test_not_a_number_never_passes() -> None:
    pair = rows(10, 8, seed=0), rows(10, 8, seed=1)
    parity = compared((np.full_like(pair[0], np.nan), pair[1]), pair)
    assert parity.shortfall is not None
    assert parity.top1_agreement == 0
