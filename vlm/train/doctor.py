"""What would go wrong with a run, and what it would cost, found out before it starts."""

import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import psutil
import torch

from vlm.distributed import World
from vlm.errors import ConfigError, DataError, VlmError
from vlm.optim import AdamWConfig
from vlm.preprocess import build_tokenizer
from vlm.train.config import TorchEngineConfig, TrainConfig
from vlm.train.doctor_memory import Probe, forecast_memory, probe_steps
from vlm.train.doctor_network import Finding, network_findings
from vlm.train.engine import TorchEngine
from vlm.train.memory import LossMemory
from vlm.train.setup import Parts, build_parts
from vlm.train.step import train_step
from vlm.types import Batch

__all__ = ["Finding", "examine"]

_POOL = 32
_LOADED_SAMPLES = 192
_GIB = 2**30


def examine(
    config: TrainConfig,
    *,
    world: World,
    world_size: int,
    scratch: Path,
    price_per_hour: float | None = None,
) -> Iterator[Finding]:
    """Examine a run of `world_size` ranks, one finding after another.

    Some steps are trained in this process, on weights and in folders that are thrown away.

    Args:
        config: The run.
        world: This one process and its device.
        world_size: Ranks that the run will have.
        scratch: An empty folder, for what the steps write.
        price_per_hour: Of one rank, in any currency.
    """
    yield from _advice(config)
    yield from network_findings(config, world_size=world_size)
    share = _share(config, world_size)
    if isinstance(share, Finding):
        yield share
        return
    micro_batch = min(config.micro_batch or share, share)
    # One process and a small batch; model, data and loss are the run's.
    local = config.model_copy(
        update={
            "output": scratch,
            "checkpoints": None,
            "global_batch": _POOL,
            "micro_batch": None,
            "steps": _LOADED_SAMPLES // _POOL,
            "samples": None,
            "epochs": None,
            "engine": TorchEngineConfig(precision=_precision(config)),
        }
    )
    try:
        parts = build_parts(local, world)
        batches = _drawn(parts)
    except (ConfigError, DataError) as error:
        check = "data" if isinstance(error, DataError) else "configuration"
        yield Finding(check=check, verdict="problem", text=str(error), advice="see above")
        return
    yield _arithmetic(config, parts, world_size=world_size, share=share, micro_batch=micro_batch)
    pool, load_rate = batches
    tokens = list(_tokens(config, pool))
    yield from tokens
    if any(finding.verdict == "problem" for finding in tokens):
        return
    yield from _terms(config, parts, pool, world)
    # Libraries load and compile at the first step, so a process that did nothing tells little.
    resident = psutil.Process().memory_info().rss
    assert isinstance(parts.engine, TorchEngine)
    probe = probe_steps(
        local, parts.engine, parts.objective, pool, world,
        micro_batch=micro_batch, clock=time.perf_counter,
    )  # fmt: skip
    held = probe.parameter_bytes + probe.optimizer_bytes
    held += _loader_bytes(local, parts, _LOADED_SAMPLES // (local.data.stream.prefetch + 1))
    process_bytes = max(resident - held, 0)
    yield _memory(
        config, probe, world,
        world_size=world_size, micro_batch=micro_batch,
        loader_bytes=_loader_bytes(config, parts, share), process_bytes=process_bytes,
    )  # fmt: skip
    yield _disk(config, probe)
    seconds = _step_seconds(probe, share)
    yield _starvation(config, share / seconds, load_rate)
    yield _cost(
        config, parts, min(share / seconds, load_rate) * world_size, world_size, price_per_hour
    )


def _advice(config: TrainConfig) -> Iterator[Finding]:
    for line in config.optim.advice():
        yield Finding(check="optimizer", verdict="warning", text=line)
    if isinstance(config.optim, AdamWConfig):
        text = f"adamw; the same strength under Lion is {config.optim.as_lion()}"
        yield Finding(check="optimizer", verdict="ok", text=text)


def _precision(config: TrainConfig) -> Literal["auto", "fp32", "bf16"]:
    found = config.engine.precision
    return found if found in ("fp32", "bf16") else "auto"


def _share(config: TrainConfig, world_size: int) -> int | Finding:
    """Samples of a rank and step, or why there are none."""
    share, rest = divmod(config.global_batch, world_size)
    below = share * world_size
    advice = f"global_batch={below or world_size} or {(share + 1) * world_size}"
    if rest or not share:
        text = f"global_batch={config.global_batch} does not divide over {world_size} ranks"
        return Finding(check="batch", verdict="problem", text=text, advice=advice)
    micro = config.micro_batch
    if micro is not None and share % min(micro, share):
        text = f"a rank's {share} samples do not divide into micro-batches of {micro}"
        advice = f"micro_batch={math.gcd(share, micro)}"
        return Finding(check="batch", verdict="problem", text=text, advice=advice)
    return share


def _drawn(parts: Parts) -> tuple[Batch, float]:
    """One batch, and how many samples a second come when nothing else is done."""
    stream = parts.stream.batches(0, parts.total_steps)
    first = next(stream)
    start, count = time.perf_counter(), 0
    for batch in stream:
        count += len(batch.images)
    return first, count / max(time.perf_counter() - start, 1e-9)


def _arithmetic(
    config: TrainConfig, parts: Parts, *, world_size: int, share: int, micro_batch: int
) -> Finding:
    steps = config.total_steps(parts.num_samples)
    epochs = steps * config.global_batch / parts.num_samples
    text = (
        f"{parts.num_samples:,} samples; {config.global_batch:,} a step = {world_size} ranks x "
        f"{share // micro_batch} micro-batches x {micro_batch}; "
        f"{steps:,} steps, {epochs:.3g} epochs"
    )
    figures = {"samples": parts.num_samples, "steps": steps, "epochs": epochs}
    if config.global_batch > parts.num_samples:
        return Finding(
            check="data", verdict="warning", figures=figures, text=text,
            advice=f"a step is larger than the data: global_batch={parts.num_samples // 2}",
        )  # fmt: skip
    return Finding(check="data", verdict="ok", text=text, figures=figures)


def _tokens(config: TrainConfig, pool: Batch) -> Iterator[Finding]:
    """Pads and end marks; that the text tower knows all ids is checked when it is built."""
    tokenize = build_tokenizer(config.tokenizer)
    probe = tokenize(["", "one", "word " * 10 * config.tokenizer.context_length])
    end = int(probe[0].max())
    kept = bool((probe == end).any(dim=1).all())
    padded = bool((probe[1][int((probe[1] == end).nonzero()[0]) + 1 :] == 0).all())
    cut = float((pool.token_ids[:, -1] != 0).float().mean())
    if config.tokenizer.type == "simple" and not (kept and padded):  # others have marks of theirs
        what = "lose their end mark when cut" if not kept else "are not padded with 0"
        yield Finding(
            check="tokenizer", verdict="problem", text=f"captions {what}",
            advice="the text tower reads at the end mark: take another tokenizer",
        )  # fmt: skip
    text = f"end mark {end}, pad 0; {cut:.0%} of captions fill all positions"
    yield Finding(
        check="tokenizer",
        verdict="warning" if cut > 0.2 else "ok",
        text=text,
        advice="raise tokenizer.context_length" if cut > 0.2 else "",
        figures={"full_fraction": cut},
    )


def _terms(config: TrainConfig, parts: Parts, pool: Batch, world: World) -> Iterator[Finding]:
    """One step of each term alone: finite, and how long it takes."""
    size = len(pool.images)
    own = config.model_copy(update={"global_batch": size, "log_every": 10**9})
    for term in config.loss:
        memory = LossMemory([term], pool.sample_ids.numpy(), world)
        objective = parts.objective.with_terms([term], memory)
        start = time.perf_counter()
        try:
            loss, norm = train_step(
                own, parts.engine, objective, pool,
                micro_batch=size, step=0, progress=1.0, world=world,
            )  # fmt: skip
        except VlmError as error:
            yield Finding(check=f"loss {term.type}", verdict="problem", text=str(error))
            continue
        seconds, value = time.perf_counter() - start, float(loss.total.detach())
        finite = math.isfinite(value) and math.isfinite(norm)
        yield Finding(
            check=f"loss {term.type}",
            verdict="ok" if finite else "problem",
            text=f"value {value:.4g}, gradient norm {norm:.4g}, {seconds:.2f} s a step of {size}",
            advice="" if finite else "engine.precision=fp32, or leave the term out",
            figures={"value": value, "gradient_norm": norm, "seconds": seconds},
        )


def _loader_bytes(config: TrainConfig, parts: Parts, share: int) -> int:
    side = round(config.image.size * config.data.augment.margin)
    image = 3 * side * side
    cached = min(parts.num_samples * image, config.data.stream.cache_bytes)
    return cached + (config.data.stream.prefetch + 1) * share * image


def _memory(
    config: TrainConfig,
    probe: Probe,
    world: World,
    *,
    world_size: int,
    micro_batch: int,
    loader_bytes: int,
    process_bytes: int,
) -> Finding:
    found = forecast_memory(
        config, probe,
        world_size=world_size, micro_batch=micro_batch,
        loader_bytes=loader_bytes, process_bytes=process_bytes,
    )  # fmt: skip
    on_cpu = world.device.type == "cpu"
    if on_cpu:
        needed, present = found.host, psutil.virtual_memory().available + process_bytes
    else:
        needed = found.tensors
        present = torch.cuda.get_device_properties(world.device).total_memory
    parts = ("parameters", "gradients", "optimizer", "ema", "activations", "loss")
    sizes = {name: float(getattr(found, name)) for name in (*parts, "loader", "process")}
    listed = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in sizes.items() if size)
    text = f"{needed / _GIB:.2f} GiB a rank of {present / _GIB:.1f} GiB here ({listed})"
    figures = {**sizes, "peak": float(needed), "tensors": float(found.tensors)}
    if needed <= 0.9 * present:
        return Finding(check="memory", verdict="ok", text=text, figures=figures)
    activations = max(found.activations, 1)
    rest = needed - found.activations
    fitting = int(micro_batch * (0.85 * present - rest) / activations)
    advice = (
        f"micro_batch={2 ** int(math.log2(fitting))} or less"
        if fitting >= 1
        else "engine.type=fsdp with more ranks, or a smaller model"
    )
    verdict: Literal["warning", "problem"] = "problem" if needed > present else "warning"
    return Finding(check="memory", verdict=verdict, text=text, advice=advice, figures=figures)


def _disk(config: TrainConfig, probe: Probe) -> Finding:
    one = probe.parameter_bytes * (2 if config.ema_decay is not None else 1)
    one += probe.optimizer_bytes
    kept = config.keep_checkpoints if config.checkpoints is None else 0  # in the store
    needed = one * (kept + 1)  # the new one is whole before an old one goes
    existing = next(p for p in (config.output, *config.output.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        text = f"{existing} is no folder that can be written"
        return Finding(check="disk", verdict="problem", text=text, advice="set output to one")
    free = shutil.disk_usage(existing).free
    text = (
        f"{one / _GIB:.2f} GiB a checkpoint, {needed / _GIB:.2f} GiB at most, "
        f"{free / _GIB:.1f} GiB free at {existing}"
    )
    figures = {"checkpoint": float(one), "needed": float(needed), "free": float(free)}
    if needed > free:
        advice = "set output to another disk, or keep_checkpoints=1"
        return Finding(check="disk", verdict="problem", text=text, advice=advice, figures=figures)
    return Finding(check="disk", verdict="ok", text=text, figures=figures)


def _step_seconds(probe: Probe, share: int) -> float:
    """Of one rank's share, by the straight line through the two small steps."""
    small, large = probe.batches
    each = probe.seconds[1] / large
    if large > small:
        each = max((probe.seconds[1] - probe.seconds[0]) / (large - small), each / 5)
    fixed = max(probe.seconds[1] - each * large, 0.0)
    return fixed + each * share


def _starvation(config: TrainConfig, model_rate: float, load_rate: float) -> Finding:
    text = f"{load_rate:,.0f} samples/s loaded, {model_rate:,.0f} samples/s computed, on one rank"
    figures = {"loaded": load_rate, "computed": model_rate}
    if load_rate >= model_rate:
        return Finding(check="loader", verdict="ok", text=text, figures=figures)
    threads = math.ceil(config.data.stream.threads * model_rate / load_rate)
    return Finding(
        check="loader", verdict="warning", text=f"starved: {text}", figures=figures,
        advice=f"data.stream.threads={threads} if there are cores, or smaller images in the shards",
    )  # fmt: skip


def _cost(
    config: TrainConfig, parts: Parts, rate: float, world_size: int, price: float | None
) -> Finding:
    samples = config.total_steps(parts.num_samples) * config.global_batch
    hours = samples / rate / 3600
    text = f"{_duration(3600 * hours)} at {rate:,.0f} samples/s on {world_size} "
    text += (
        "device like this one"
        if world_size == 1
        else ("devices like this one, if so many are so many times as fast")
    )
    figures = {"hours": hours, "samples_per_second": rate}
    if price is not None:
        figures["cost"] = hours * world_size * price
        text += f"; {figures['cost']:,.2f} at {price:g} a device and hour"
    return Finding(check="time", verdict="ok", text=text, figures=figures)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
