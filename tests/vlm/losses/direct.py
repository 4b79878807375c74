"""Every pairwise loss once more, as its formula reads: whole matrices, no tiles, no shortcuts."""

import torch
import torch.nn.functional as F
from torch import Tensor


def clip(
    image: Tensor, text: Tensor, scale: Tensor, *, ids: Tensor, mode: str, smoothing: float = 0.0
) -> Tensor:
    same = ids[:, None] == ids[None] if mode != "negative" else torch.eye(len(ids)).bool()
    eye = torch.eye(len(ids)).bool()
    positives = same if mode == "positive" else eye
    allowed = ~(same & ~eye) if mode == "mask" else torch.ones_like(eye)
    target = (1 - smoothing) * positives.to(image.dtype) / positives.sum(1, keepdim=True)
    target = target + smoothing * allowed.to(image.dtype) / allowed.sum(1, keepdim=True)
    total = image.new_zeros(())
    for logits in (scale * image @ text.T, scale * text @ image.T):
        for row in range(len(ids)):
            kept = logits[row][allowed[row]]
            total = total + F.cross_entropy(kept[None], target[row][allowed[row]][None])
    return total / (2 * len(ids))


def siglip(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *, ids: Tensor, mode: str
) -> Tensor:
    same = ids[:, None] == ids[None] if mode != "negative" else torch.eye(len(ids)).bool()
    eye = torch.eye(len(ids)).bool()
    positives = same if mode == "positive" else eye
    asked = ~(same & ~eye) if mode == "mask" else torch.ones_like(eye)
    logits = scale * image @ text.T + bias
    signed = torch.where(positives, logits, -logits)
    return -F.logsigmoid(signed)[asked].sum() / len(ids)


def dcl(
    image: Tensor, text: Tensor, scale: Tensor, *, ids: Tensor, mode: str, sigma: float | None
) -> Tensor:
    same = ids[:, None] == ids[None] if mode != "negative" else torch.eye(len(ids)).bool()
    cosines = image @ text.T
    diagonal = cosines.diagonal()
    if mode == "positive":
        diagonal = torch.stack([row[keep].mean() for row, keep in zip(cosines, same, strict=True)])
    weight = torch.ones(len(ids), dtype=image.dtype)
    if sigma is not None:
        potential = (diagonal.detach() / sigma).exp()
        weight = 2 - potential / potential.mean()
    total = image.new_zeros(())
    for logits in (scale * cosines, scale * cosines.T):
        for row in range(len(ids)):
            total = total + logits[row][~same[row]].exp().sum().log()
    return total / (2 * len(ids)) - (weight * scale * diagonal).mean()


def uniformity(left: Tensor, right: Tensor, *, ids: Tensor, t: float) -> Tensor:
    keep = ids[:, None] != ids[None]
    potential = torch.exp(2 * t * (left @ right.T - 1))
    return potential[keep].mean().log()
