"""The two terms of CLIP-Refine, which bring the modalities of a trained model nearer.

They work on raw features, before normalisation, as the authors' code does. Where that differs from
the paper's formulas it is said, for its weights of 1 belong to the code.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["hybrid_distillation_loss", "random_alignment_loss"]

Rows = Float[Tensor, "batch dim"]


def random_alignment_loss(image: Rows, text: Rows, reference: Rows) -> Float[Tensor, ""]:
    r"""Pulls both members of a pair to one random point: RaFA.

    $$\frac{1}{Bd} \sum_i \lVert I_i - z_i \rVert^2 + \lVert T_i - z_i \rVert^2$$

    Args:
        image: Raw features.
        text: Raw features.
        reference: z, drawn from N(0, 1), one row a pair.

    Source: CLIP-Refine (arXiv:2504.12717), section 4.1, averaged over coordinates as its code
        (github.com/yshinya6/clip-refine) does: 2/d times the printed formula.
    """
    return F.mse_loss(image, reference) + F.mse_loss(text, reference)


def hybrid_distillation_loss(
    image: Rows, text: Rows, teacher_image: Rows, teacher_text: Rows, *, alpha: float
) -> Float[Tensor, ""]:
    r"""Keeps what the start model knew, and adds that pairs belong together: HyCD.

    $$\tfrac12 \left[ KL(\alpha 1 + (1 - \alpha) q \,\Vert\, p) + sym \right]$$ with p the softmax
    of a row of products of raw features, and q that of the start model.

    Args:
        image: Raw features.
        text: Raw features.
        teacher_image: Of the frozen start model.
        teacher_text: Of the frozen start model.
        alpha: The share of the pairs themselves, 0 to 1.

    Source: CLIP-Refine (arXiv:2504.12717), section 4.2; its code has no logit scale here.
    """
    student, teacher = image @ text.T, teacher_image @ teacher_text.T
    return 0.5 * (_divergence(student, teacher, alpha) + _divergence(student.T, teacher.T, alpha))


def _divergence(
    student: Float[Tensor, "batch batch"], teacher: Float[Tensor, "batch batch"], alpha: float
) -> Float[Tensor, ""]:
    own = torch.eye(len(student), dtype=student.dtype, device=student.device)
    target = alpha * own + (1 - alpha) * teacher.softmax(dim=1)
    return F.kl_div(student.log_softmax(dim=1), target, reduction="batchmean")
