import pytest
import torch

from vlm.losses import hybrid_distillation_loss, random_alignment_loss


def rows(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).double()


def test_random_alignment_is_the_mean_square_over_coordinates() -> None:
    image, text, reference = (rows(5, 3, seed) for seed in range(3))
    direct = ((image - reference) ** 2 + (text - reference) ** 2).sum() / (5 * 3)
    assert float(random_alignment_loss(image, text, reference)) == pytest.approx(float(direct))
    assert float(random_alignment_loss(reference, reference, reference)) == 0


def test_hybrid_distillation_is_the_divergence_from_the_mixture_in_both_directions() -> None:
    image, text, known_image, known_text = (rows(4, 3, seed) for seed in range(4))
    direct = 0.0
    for a, b, c, d in (
        (image, text, known_image, known_text),
        (text, image, known_text, known_image),
    ):
        p, q = (a @ b.T).softmax(dim=1), (c @ d.T).softmax(dim=1)
        target = 0.3 * torch.eye(4).double() + 0.7 * q
        direct += 0.5 * float((target * (target / p).log()).sum(dim=1).mean())
    found = hybrid_distillation_loss(image, text, known_image, known_text, alpha=0.3)
    assert float(found) == pytest.approx(direct, abs=1e-9)


def test_a_student_that_is_its_teacher_has_nothing_to_distil_but_the_pairs() -> None:
    image, text = rows(4, 3, 0), rows(4, 3, 1)
    assert float(hybrid_distillation_loss(image, text, image, text, alpha=0.0)) == pytest.approx(0)
    assert float(hybrid_distillation_loss(image, text, image, text, alpha=0.5)) > 0.01
