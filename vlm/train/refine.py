"""CLIP-Refine: one epoch over pairs that narrows the gap of a trained model.

Source: Yamaguchi et al. 2025 (arXiv:2504.12717) with the scaling and the constants of its code
(github.com/yshinya6/clip-refine): AdamW, learning rate 1e-6, weight decay 0.1, batch 512.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.data.dataset import open_reader
from vlm.data.reader import Reader
from vlm.data.remote import RemoteConfig
from vlm.data.samples import Sample
from vlm.errors import DataError
from vlm.inference import BundleInfo
from vlm.losses import hybrid_distillation_loss, random_alignment_loss
from vlm.models import DualEncoder
from vlm.preprocess import (
    Pixels,
    build_tokenizer,
    decode_image,
    normalise_images,
    resize_image,
)
from vlm.train.derive import load_origin, require_dual_encoder, require_free, save_derived
from vlm.train.refine_progress import Progress
from vlm.train.signals import Stop
from vlm.types import Tokenize

__all__ = ["RefineConfig", "refine"]


class RefineConfig(Config):
    """How a model is refined; the defaults are the authors'."""

    lr: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    batch: int = Field(512, ge=2)
    alpha: float = Field(0.5, ge=0, le=1)
    """The share of the pairs themselves in what is distilled."""
    alignment_weight: float = Field(1.0, ge=0)
    epochs: int = Field(1, ge=1)
    seed: int = 0
    log_every: int = Field(10, ge=1)
    save_every: int = Field(100, ge=1)
    """Steps between two saves of the progress."""


def refine(
    model: Path,
    shards: Path,
    folder: Path,
    config: RefineConfig,
    *,
    device: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
    stop: Stop | None = None,
) -> BundleInfo | None:
    """Refine a dual encoder on pairs and write the bundle of the result.

    One process. Progress lies in a hidden file beside `folder` until the bundle is written; the
    same call goes on from there, to the same weights. Images are resized as for evaluation,
    without augmentation. The last pairs that do not fill a batch are left out.

    Args:
        model: A bundle, a run or a checkpoint.
        shards: A dataset folder.
        folder: Of the new bundle.
        config: How.
        device: Where to compute.
        say: Told a line now and then.
        stop: Asked after each step whether to save and leave.

    Returns:
        What the bundle is; none if it was stopped before the end.

    Raises:
        BundleError: If the model is no dual encoder, or `folder` is taken by something else.
        CheckpointError: If the progress found is damaged or belongs to other work.
        DataError: If the pairs cannot be read, are fewer than a batch, or the loss is no number.
    """
    require_free(folder)
    origin = load_origin(model)
    student = require_dual_encoder(origin).to(device).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    # What the two terms leave alone: neither multiplies with the logit scale.
    student.log_logit_scale.requires_grad_(False)
    reader, _ = open_reader(str(shards), remote=RemoteConfig(), run_length=1)
    with reader:
        steps = reader.num_samples // config.batch
        if steps == 0:
            message = (
                f"{shards}: {reader.num_samples} pairs do not fill one batch of {config.batch}; "
                f"set batch={reader.num_samples} or less"
            )
            raise DataError(message)
        info = origin.bundle.info
        pairs = _Pairs(
            reader=reader, info=info, tokenize=build_tokenizer(info.tokenizer), device=device
        )
        facts = {
            "model": info.fingerprint,
            "shards": reader.fingerprint,
            "settings": config.model_dump(mode="json", exclude={"log_every", "save_every"}),
        }
        progress = Progress.beside(folder, facts)
        if not _epochs(student, teacher, pairs, config, progress, say, stop or Stop()):
            return None
    refined = save_derived(
        folder,
        student.cpu(),
        origin,
        name=f"{origin.bundle.info.name} refined",
        provenance={
            "refined_from": origin.bundle.info.fingerprint,
            "refine": config.model_dump(mode="json"),
            "steps": steps * config.epochs,
        },
        shards=[shards],
    )
    progress.remove()
    return refined


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """Batches of a dataset as the model reads them."""

    reader: Reader
    info: BundleInfo
    tokenize: Tokenize
    device: str

    def batch(
        self, rows: Int64[np.ndarray, " batch"]
    ) -> tuple[Float[Tensor, "batch channel height width"], Int64[Tensor, "batch token"]]:
        side = self.info.image.decode_side()
        samples = [self.reader.read(row) for row in rows.tolist()]
        decoded = [_decoded(sample, side) for sample in samples]
        pixels = np.stack([resize_image(image, self.info.image) for image in decoded])
        token_ids = self.tokenize([sample.text for sample in samples])
        images = normalise_images(torch.from_numpy(pixels).to(self.device), self.info.image)
        return images, token_ids.to(self.device)


def _decoded(sample: Sample, side: int | None) -> Pixels:
    try:
        return decode_image(sample.image, min_side=side)
    except DataError as error:
        message = f"sample {sample.key!r}: {error}. Mend it first: vlm data check FOLDER --repair"
        raise DataError(message) from error


def _epochs(
    student: DualEncoder,
    teacher: DualEncoder,
    pairs: _Pairs,
    config: RefineConfig,
    progress: Progress,
    say: Callable[[str], None],
    stop: Stop,
) -> bool:
    """All steps, or those up to a stop; whether it came to the end."""
    an_epoch = pairs.reader.num_samples // config.batch
    total = an_epoch * config.epochs
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    first = progress.load(student, optimizer)
    if first:
        say(f"going on after step {first}/{total}")
    start = time.monotonic()
    for step in range(first, total):
        epoch, place = divmod(step, an_epoch)
        order = torch.randperm(pairs.reader.num_samples, generator=_drawn(config, "order", epoch))
        images, token_ids = pairs.batch(order.split(config.batch)[place].numpy())
        image, text = _raw_features(student, images, token_ids)
        with torch.no_grad():
            known = _raw_features(teacher, images, token_ids)
        reference = torch.randn(image.shape, generator=_drawn(config, "reference", step))
        alignment = random_alignment_loss(image, text, reference.to(pairs.device))
        distillation = hybrid_distillation_loss(image, text, *known, alpha=config.alpha)
        loss = config.alignment_weight * alignment + distillation
        if not math.isfinite(loss.item()):
            message = f"step {step + 1}: the loss is {loss.item()}; lower lr={config.lr:g}"
            raise DataError(message)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        done = step + 1
        if done % config.log_every == 0 or done == total:
            rate = (done - first) * config.batch / (time.monotonic() - start)
            say(
                f"step {done}/{total}  alignment {alignment.item():.4f}  "
                f"distillation {distillation.item():.4f}  {rate:.0f} samples/s  "
                f"{(total - done) * config.batch / rate:.0f} s to go"
            )
        if stop.requested or done % config.save_every == 0 or done == total:
            progress.save(student, optimizer, done)
        if stop.requested and done < total:
            return False
    return True


def _drawn(
    config: RefineConfig, what: Literal["order", "reference"], place: int
) -> torch.Generator:
    """A generator for one epoch or one step, so that work goes on anywhere without a replay."""
    seeds = np.random.SeedSequence((config.seed, what == "order", place))
    return torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0]))


def _raw_features(
    model: DualEncoder,
    images: Float[Tensor, "batch channel height width"],
    token_ids: Int64[Tensor, "batch token"],
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
    """Of both towers, before normalisation."""
    return model.image(images).float(), model.text(token_ids).float()
