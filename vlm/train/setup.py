"""From a configuration to the parts of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from vlm.data.manifest import open_manifest
from vlm.data.plan import Plan, usual_run_length
from vlm.data.reader import Reader
from vlm.data.stream import TrainStream
from vlm.distributed import World
from vlm.errors import ConfigError
from vlm.models import DualEncoder
from vlm.optim import build_optimizer
from vlm.preprocess import ImageConfig, build_tokenizer, decode_image, resize_image
from vlm.train.config import TrainConfig
from vlm.train.engine import Engine, TorchEngine

__all__ = ["Parts", "build_model", "build_parts", "resume_facts"]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop drives."""

    engine: Engine
    stream: TrainStream
    total_steps: int
    num_samples: int
    run_length: int
    data_fingerprint: str


def build_model(config: TrainConfig) -> DualEncoder:
    """The model with fresh weights, decided by `config.seed`."""
    torch.manual_seed(config.seed)
    return DualEncoder(open_clip_config(config))


def open_clip_config(config: TrainConfig) -> dict[str, Any]:
    """open_clip's `model_cfg` of the model that this run trains."""
    return config.model.open_clip_config(
        image_size=config.image.size, context_length=config.tokenizer.context_length
    )


def build_parts(config: TrainConfig, world: World) -> Parts:
    """Open the data, build model, optimizer and engine.

    Raises:
        ConfigError: If the global batch does not divide over the ranks.
        DataError: If the dataset cannot be opened.
    """
    if config.global_batch % world.size:
        message = (
            f"global_batch={config.global_batch} does not divide over {world.size} ranks; "
            f"choose a multiple of {world.size}"
        )
        raise ConfigError(message)
    manifest = open_manifest(config.data.shards)
    run_length = config.data.stream.run_length or usual_run_length(manifest.num_samples)
    stream = TrainStream(
        reader=Reader(manifest),
        plan=Plan(
            num_samples=manifest.num_samples,
            global_batch=config.global_batch,
            seed=config.seed,
            run_length=run_length,
        ),
        config=config.data.stream,
        prepare_image=_image_preparer(config),
        tokenize=build_tokenizer(config.tokenizer),
        ledger=config.run_folder / "quarantine.jsonl",
        rank=world.rank,
        size=world.size,
    )
    model = build_model(config).to(world.device)
    return Parts(
        engine=_build_engine(config, model, world),
        stream=stream,
        total_steps=config.total_steps(manifest.num_samples),
        num_samples=manifest.num_samples,
        run_length=run_length,
        data_fingerprint=manifest.fingerprint,
    )


def resume_facts(config: TrainConfig, parts: Parts) -> dict[str, Any]:
    """What must be equal for a checkpoint to continue this run, as plain JSON."""
    watched = config.model_dump(
        mode="json", include={"seed", "global_batch", "image", "tokenizer", "model", "optim"}
    )
    return {
        **watched,
        "run_length": parts.run_length,
        "captions": config.data.stream.captions.model_dump(mode="json"),
        "total_steps": parts.total_steps,
        "data_fingerprint": parts.data_fingerprint,
    }


def _build_engine(config: TrainConfig, model: DualEncoder, world: World) -> Engine:
    optimizer = build_optimizer(model.named_parameters(), config.optim)
    if config.engine.type == "torch":
        return TorchEngine(model, optimizer, config.engine, world)
    from vlm.train.deepspeed_engine import DeepSpeedEngine  # noqa: PLC0415 - optional extra

    return DeepSpeedEngine(
        model,
        optimizer,
        config.engine,
        world,
        micro_batch=config.global_batch // world.size,
        clip_norm=config.optim.clip_norm,
    )


def _image_preparer(
    config: TrainConfig,
) -> Callable[[bytes], UInt8[np.ndarray, "channel height width"]]:
    size = round(config.image.size * config.data.augment.margin)
    return partial(_prepare_image, config=config.image, size=size)


def _prepare_image(
    data: bytes, *, config: ImageConfig, size: int
) -> UInt8[np.ndarray, "channel height width"]:
    return resize_image(decode_image(data), config, size=size)
