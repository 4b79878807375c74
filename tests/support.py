"""Small real things that many tests need: images, shards, models, bundles."""

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from vlm.data.manifest import Manifest, build_manifest
from vlm.data.mixture import MixturePlan, build_mixture
from vlm.data.plan import Plan
from vlm.data.reader import Reader
from vlm.data.samples import Sample
from vlm.data.sources.protocol import BadSample, SampleSource
from vlm.data.stream import Source, StreamConfig, TrainStream
from vlm.data.write import write_shards
from vlm.inference import BundleInfo, Encoder, bundle_fingerprint, save_bundle
from vlm.models import DualEncoder, DualEncoderConfig
from vlm.preprocess import (
    ImageConfig,
    TokenizerConfig,
    build_tokenizer,
    prepare_image,
    stack_images,
)

COLOURS = ("red", "green", "blue", "yellow", "black", "orange", "purple", "gray")
SHAPES = ("circle", "square")
STREAM_BATCH = 12

TINY_MODEL: dict[str, Any] = {
    "dim": 16,
    "image": {"type": "vit", "width": 32, "layers": 1, "head_width": 16, "patch_size": 8},
    "text": {"type": "transformer", "width": 32, "layers": 1, "heads": 2},
}

TINY_COCA: dict[str, Any] = {
    "type": "coca",
    "dim": 16,
    "image": {"type": "vit", "width": 32, "layers": 1, "head_width": 16, "patch_size": 8},
    "text": {"width": 32, "heads": 2, "unimodal_layers": 1, "multimodal_layers": 2},
    "caption_queries": 6,
    "pooler_heads": 2,
}


def unit_rows(count: int, dim: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def drawing(colour: str, shape: str, *, size: int = 32, seed: int = 0) -> Image.Image:
    shift = int(np.random.default_rng(seed).integers(-3, 4))
    image = Image.new("RGB", (size, size), "white")
    box = (6 + shift, 6, size - 6 + shift, size - 6)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    else:
        pen.rectangle(box, fill=colour)
    return image


def encoded(image: Image.Image, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def drawn_samples(count: int) -> list[Sample]:
    """Coloured shapes; sample i repeats the concept of sample i - 16."""
    samples = []
    for number in range(count):
        colour = COLOURS[number % len(COLOURS)]
        shape = SHAPES[number // len(COLOURS) % len(SHAPES)]
        samples.append(
            Sample(
                key=f"s{number:05d}",
                image=encoded(drawing(colour, shape, seed=number)),
                text=f"a {colour} {shape}",
                metadata={
                    "concept": f"{colour}-{shape}",
                    "tags": [colour, shape],
                    "style": "drawn",
                },
            )
        )
    return samples


def write_dataset(folder: Path, count: int = 48, *, samples_per_shard: int = 10) -> Manifest:
    write_shards(drawn_samples(count), folder, prefix="drawn", samples_per_shard=samples_per_shard)
    return build_manifest(folder)


def train_stream(
    reader: Reader,
    config: StreamConfig,
    *,
    seed: int,
    run_length: int = 1,
    image_size: int = 16,
    context_length: int = 8,
    **where: Any,
) -> TrainStream:
    """A stream of one source in batches of `STREAM_BATCH`; `where` is rank, size and ledger."""
    plan = Plan(
        num_samples=reader.num_samples,
        global_batch=STREAM_BATCH,
        seed=seed,
        run_length=run_length,
    )
    return TrainStream(
        sources=[Source(name="drawn", reader=reader, captions=config.captions)],
        plan=only(plan),
        config=config,
        prepare_image=partial(prepare_image, config=ImageConfig(size=image_size)),
        stack_images=stack_images,
        tokenize=build_tokenizer(TokenizerConfig(context_length=context_length)),
        **where,
    )


def only(plan: Plan) -> MixturePlan:
    """The mixture of one source."""
    return build_mixture(
        [plan], weights=[1.0], repeats=[True], global_batch=plan.global_batch, seed=plan.seed
    )


def samples_of(source: SampleSource) -> list[Sample]:
    found = list(source.read(0, len(source)))
    good = [sample for sample in found if isinstance(sample, Sample)]
    assert len(good) == len(found)
    return good


def reasons_of(source: SampleSource) -> dict[str, str]:
    found = source.read(0, len(source))
    return {bad.key: bad.reason for bad in found if isinstance(bad, BadSample)}


def tiny_bundle(folder: Path, *, seed: int = 0, bias: float | None = None) -> BundleInfo:
    torch.manual_seed(seed)
    config = DualEncoderConfig.model_validate({**TINY_MODEL, "init_logit_bias": bias})
    open_clip_config = config.open_clip_config(image_size=32, context_length=12)
    return save_bundle(
        folder,
        DualEncoder(open_clip_config),
        name="tiny",
        open_clip_config=open_clip_config,
        image=ImageConfig(size=32),
        tokenizer=TokenizerConfig(context_length=12),
        metrics={"zero_shot": {}},
    )


def give_means(bundle: Path, pictures: list[Image.Image], captions: list[str]) -> None:
    """Let a bundle know the means of its modalities, taken from these."""
    encoder = Encoder.load(bundle)
    means = {
        "image": encoder.encode_images(pictures).mean(axis=0).tolist(),
        "text": encoder.encode_texts(captions).mean(axis=0).tolist(),
        "num_pairs": len(pictures),
    }
    describe(bundle, modality_means=means)


def describe(bundle: Path, **fields: Any) -> None:
    """Set fields of a bundle's description, and the fingerprint that it has then."""
    tree = {**json.loads((bundle / "bundle.json").read_text()), **fields}
    tree["fingerprint"] = bundle_fingerprint(tree)
    (bundle / "bundle.json").write_text(json.dumps(tree))
