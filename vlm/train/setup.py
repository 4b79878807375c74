"""From a configuration to the parts of a run."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from vlm.data.dataset import open_reader
from vlm.data.mixture import MixturePlan, build_mixture
from vlm.data.permute import mix
from vlm.data.plan import Plan
from vlm.data.samples import hash_text
from vlm.data.stream import Source, TrainStream
from vlm.distributed import World
from vlm.errors import ConfigError
from vlm.losses import initial_sample_values
from vlm.models import Model, load_initial_weights, parameter_depths
from vlm.models import build_model as build
from vlm.optim import build_optimizer
from vlm.preprocess import build_tokenizer, prepare_image, stack_images, tokenizer_vocab_size
from vlm.train.config import TrainConfig
from vlm.train.engine import Engine, TorchEngine
from vlm.train.fsdp_engine import FsdpEngine, shard_model
from vlm.train.memory import LossMemory
from vlm.train.objective import Objective
from vlm.train.places import checkpoint_place
from vlm.train.teacher import load_teacher

__all__ = ["Parts", "build_model", "build_parts", "resume_facts"]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop drives."""

    engine: Engine
    objective: Objective
    stream: TrainStream
    micro_batch: int
    """Samples of a rank in one forward."""
    total_steps: int
    num_samples: int
    data_facts: list[dict[str, Any]]
    """Of each source, what decides its samples and their order."""
    data_fingerprint: str


def build_model(config: TrainConfig, *, initial_weights: bool = True) -> Model:
    """The model as training begins, decided by `config.seed`.

    Args:
        config: The run's.
        initial_weights: Whether to load those that it starts from; no, if all will be replaced.

    Raises:
        ConfigError: If weights or architectures cannot be had, or the tokenizer has more ids than
            the text tower knows.
    """
    torch.manual_seed(config.seed)
    model = build(
        config.model,
        image_size=config.image.size,
        context_length=config.tokenizer.context_length,
    )
    known, needed = model.vocab_size, tokenizer_vocab_size(config.tokenizer)
    if known < needed:
        message = (
            f"tokenizer: has {needed} ids, and the text tower knows {known}; choose the tokenizer "
            f"that the tower was made with, or a larger tower (model.text.vocab_size={needed})"
        )
        raise ConfigError(message)
    if initial_weights:
        load_initial_weights(model, config.model, image=config.image)
    return model


def open_clip_config(config: TrainConfig) -> dict[str, Any] | None:
    """open_clip's `model_cfg` of the model that this run trains, if open_clip has such a model."""
    if config.model.type == "coca":
        return None
    return config.model.open_clip_config(
        image_size=config.image.size, context_length=config.tokenizer.context_length
    )


def build_parts(config: TrainConfig, world: World) -> Parts:
    """Open the data, build model, optimizer and engine.

    Raises:
        ConfigError: If the global batch does not divide over ranks and micro-batches.
        DataError: If the dataset cannot be opened.
    """
    micro_batch = _micro_batch(config, world)
    opened = _open_sources(config)
    sources = [source for source, _ in opened]
    num_samples = sum(source.reader.num_samples for source in sources)
    total_steps = config.total_steps(num_samples)
    plan = _mixture(config, sources, [run_length for _, run_length in opened])
    if plan.end is not None and total_steps * config.global_batch > plan.end:
        message = (
            f"the sources, none of which repeats, are used up after "
            f"{plan.end // config.global_batch} whole steps and steps={total_steps}: "
            f"lower steps, or let one repeat"
        )
        raise ConfigError(message)
    stream = TrainStream(
        sources=sources,
        plan=plan,
        config=config.data.stream,
        prepare_image=_image_preparer(config),
        stack_images=stack_images,
        tokenize=build_tokenizer(config.tokenizer),
        ledger=config.run_folder / "quarantine.jsonl",
        rank=world.rank,
        size=world.size,
    )
    # A run that is resumed has weights of its own, and what it started from may be gone.
    fresh = not checkpoint_place(config).steps()
    model = build_model(config, initial_weights=fresh).to(world.device)
    if config.temperature is not None:
        model.log_logit_scale.requires_grad_(False)
    facts = _data_facts(config, opened)
    fingerprints = [fact["fingerprint"] for fact in facts]
    return Parts(
        engine=_build_engine(config, model, world, micro_batch),
        objective=_build_objective(config, sources, world),
        stream=stream,
        micro_batch=micro_batch,
        total_steps=total_steps,
        num_samples=num_samples,
        data_facts=facts,
        data_fingerprint=fingerprints[0]
        if len(fingerprints) == 1
        else hashlib.sha256(" ".join(fingerprints).encode()).hexdigest(),
    )


def _micro_batch(config: TrainConfig, world: World) -> int:
    share, rest = divmod(config.global_batch, world.size)
    if rest:
        message = (
            f"global_batch={config.global_batch} does not divide over {world.size} ranks; "
            f"choose a multiple of {world.size}"
        )
        raise ConfigError(message)
    micro_batch = min(config.micro_batch or share, share)
    if share % micro_batch:
        message = (
            f"global_batch={config.global_batch} gives each of {world.size} ranks {share} samples, "
            f"which do not divide into micro-batches of micro_batch={micro_batch}; "
            f"choose a divisor of {share}"
        )
        raise ConfigError(message)
    return micro_batch


def _open_sources(config: TrainConfig) -> list[tuple[Source, int]]:
    """Each source with its run length."""
    opened = []
    for source in config.data.all_sources:
        reader, run_length = open_reader(
            source.shards,
            remote=config.data.remote,
            run_length=config.data.stream.run_length,
            filter_name=source.filter,
        )
        captions = source.captions or config.data.stream.captions
        salt = hash_text(source.name) >> 1 if len(config.data.all_sources) > 1 else 0
        opened.append(
            (Source(name=source.name, reader=reader, captions=captions, salt=salt), run_length)
        )
    return opened


def _mixture(config: TrainConfig, sources: list[Source], run_lengths: list[int]) -> MixturePlan:
    settings = config.data.all_sources
    weights = [source.weight for source in settings]
    plans = [
        Plan(
            num_samples=source.reader.num_samples,
            # Lanes of a source: its places in a batch, so that a run stays with one rank.
            global_batch=max(1, round(config.global_batch * weight / sum(weights))),
            seed=config.seed if len(sources) == 1 else mix(config.seed, hash_text(source.name)),
            run_length=run_length,
        )
        for source, weight, run_length in zip(sources, weights, run_lengths, strict=True)
    ]
    return build_mixture(
        plans,
        weights=weights,
        repeats=[source.repeat for source in settings],
        curriculum=[
            (stage.from_step, [stage.weights.get(source.name, 0.0) for source in settings])
            for stage in config.data.curriculum
        ],
        global_batch=config.global_batch,
        seed=config.seed,
    )


def _data_facts(config: TrainConfig, opened: list[tuple[Source, int]]) -> list[dict[str, Any]]:
    return [
        {
            **settings.model_dump(mode="json", include={"name", "weight", "repeat"}),
            "fingerprint": source.reader.fingerprint,
            "run_length": run_length,
            "captions": source.captions.model_dump(mode="json"),
        }
        for settings, (source, run_length) in zip(config.data.all_sources, opened, strict=True)
    ]


def resume_facts(config: TrainConfig, parts: Parts) -> dict[str, Any]:
    """What must be equal for a checkpoint to continue this run, as plain JSON."""
    watched = config.model_dump(
        mode="json", include={"seed", "global_batch", "image", "tokenizer", "model", "optim"}
    )
    return {
        **watched,
        "sources": parts.data_facts,
        "curriculum": [stage.model_dump(mode="json") for stage in config.data.curriculum],
        "total_steps": parts.total_steps,
        "data_fingerprint": parts.data_fingerprint,
        "teacher": parts.objective.teacher_fingerprint,
    }


def _build_objective(config: TrainConfig, sources: list[Source], world: World) -> Objective:
    remembering = sources if initial_sample_values(config.loss) else []
    ids = [
        source.reader.sample_ids(np.arange(source.reader.num_samples)) ^ source.salt
        for source in remembering
    ]
    teacher = None
    if config.teacher is not None:
        teacher = load_teacher(
            config.teacher, image=config.image, tokenizer=config.tokenizer, device=world.device
        )
    memory = LossMemory(config.loss, np.concatenate([np.empty(0, np.int64), *ids]), world)
    return Objective(config.loss, memory=memory, teacher=teacher, world=world)


def _build_engine(config: TrainConfig, model: Model, world: World, micro_batch: int) -> Engine:
    if config.engine.type == "fsdp":
        shard_model(model, config.engine, world)
    depths = parameter_depths(name for name, _ in model.named_parameters())
    optimizer = build_optimizer(model.named_parameters(), config.optim, depth=depths.get)
    if config.engine.type == "torch":
        return TorchEngine(model, optimizer, config.engine, world)
    if config.engine.type == "fsdp":
        return FsdpEngine(model, optimizer, config.engine, world)
    from vlm.train.deepspeed_engine import DeepSpeedEngine  # noqa: PLC0415 - optional extra

    return DeepSpeedEngine(
        model,
        optimizer,
        config.engine,
        world,
        micro_batch=micro_batch,
        accumulation=config.global_batch // world.size // micro_batch,
        clip_norm=config.optim.clip_norm,
    )


def _image_preparer(
    config: TrainConfig,
) -> Callable[[bytes], UInt8[np.ndarray, "channel height width"]]:
    size = round(config.image.size * config.data.augment.margin)
    return partial(prepare_image, config=config.image, size=size)
