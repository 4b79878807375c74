import numpy as np
import pytest

from vlm.inference.temperature import (
    TEMPERATURE_RANGE,
    calibration_error,
    fit_exclusive_temperature,
    fit_independent_temperature,
    fit_none_threshold,
)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def test_labels_drawn_from_a_softmax_give_its_temperature_back() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(20_000, 5))
    labels = (softmax(logits).cumsum(axis=1) < random.random((20_000, 1))).sum(axis=1)
    assert fit_exclusive_temperature(3 * logits, labels) == pytest.approx(3, rel=0.05)
    confidence = softmax(logits)
    right = confidence.argmax(axis=1) == labels
    assert calibration_error(confidence.max(axis=1), right) < 0.02
    sharp = softmax(3 * logits)
    assert calibration_error(sharp.max(axis=1), right) > 0.15


def test_what_holds_by_a_sigmoid_gives_its_temperature_back() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(20_000, 3))
    holds = random.random((20_000, 3)) < 1 / (1 + np.exp(-logits))
    assert fit_independent_temperature(logits / 4, holds) == pytest.approx(0.25, rel=0.05)


def test_the_fit_is_that_of_the_closed_form_for_two_logits() -> None:
    # Right three times of four at logits 1 and 0: sigmoid(1 / T) = 3/4, so T = 1 / ln 3.
    logits = np.array([[1.0, 0.0]] * 4)
    found = fit_exclusive_temperature(logits, np.array([0, 0, 0, 1]))
    assert found == pytest.approx(1 / np.log(3), rel=1e-5)


def test_a_sample_without_mistakes_ends_at_the_range() -> None:
    logits = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert fit_exclusive_temperature(logits, np.array([0, 1])) == pytest.approx(
        TEMPERATURE_RANGE[0], rel=1e-3
    )
    assert fit_exclusive_temperature(logits, np.array([1, 0])) == pytest.approx(
        TEMPERATURE_RANGE[1], rel=1e-3
    )


def test_calibration_error_of_hand_made_bins() -> None:
    confidence = np.array([0.95, 0.95, 0.55, 1.0])
    correct = np.array([True, False, True, True])
    # One bin holds all of 14/15 and more: 2.9 claimed, 2 right; the other 0.55 claimed, 1 right.
    assert calibration_error(confidence, correct) == pytest.approx((0.9 + 0.45) / 4)


def test_the_threshold_lies_between_what_is_known_and_what_is_not() -> None:
    known, none = np.array([0.9, 0.8, 0.3]), np.array([0.2, 0.5])
    assert fit_none_threshold(known, none) == pytest.approx(0.65)
    assert fit_none_threshold(np.array([0.9]), np.array([0.9])) == 0
