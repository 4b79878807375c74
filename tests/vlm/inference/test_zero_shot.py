import numpy as np
import pytest

from vlm.inference import (
    class_embeddings,
    exclusive_probabilities,
    fill_templates,
    independent_probabilities,
)


def test_templates_are_filled_at_their_marks() -> None:
    assert fill_templates("{x}", ["a {}", "{} {}"]) == ["a {x}", "{x} {x}"]


@pytest.mark.parametrize(
    ("templates", "said"), [([], "at least one template"), (["a"], "has no {}")]
)
def test_templates_that_cannot_be_filled_are_refused(templates: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fill_templates("x", templates)


def test_a_class_is_the_normalised_mean_of_its_prompts() -> None:
    vectors = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.6, 0.8]}
    rows = class_embeddings(
        lambda texts: np.array([vectors[t] for t in texts], np.float32), [["a", "b"], ["c"]]
    )
    np.testing.assert_allclose(rows, [[2**-0.5, 2**-0.5], [0.6, 0.8]], atol=1e-6)


def test_exclusive_probabilities_are_a_softmax_that_does_not_overflow() -> None:
    cosines = np.array([[1.0, -1.0, 1.0]], np.float32)
    np.testing.assert_allclose(
        exclusive_probabilities(cosines, 100.0), [[0.5, 0.0, 0.5]], atol=1e-7
    )


def test_independent_probabilities_are_a_sigmoid_that_does_not_overflow() -> None:
    cosines = np.array([[0.5, -1.0, 1.0]], np.float32)
    found = independent_probabilities(cosines, 1000.0, -500.0)
    np.testing.assert_allclose(found, [[0.5, 0.0, 1.0]], atol=1e-7)
