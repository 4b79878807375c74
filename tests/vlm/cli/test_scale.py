"""Formulas of the scale plan against the real engine, and against a simulation of failures."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from tests.distributed import run_ranks
from tests.support import TINY_MODEL
from vlm.cli import scale_formulas as formulas
from vlm.cli.main import app
from vlm.cli.scale_formulas import Checkpointing
from vlm.config import validate_config
from vlm.distributed import World
from vlm.losses.terms import ClipTerm
from vlm.models import DualEncoder, DualEncoderConfig
from vlm.optim import build_optimizer
from vlm.train.checkpoint import open_writer
from vlm.train.config import TorchEngineConfig, TrainConfig
from vlm.train.engine import TorchEngine
from vlm.train.objective import global_loss
from vlm.train.places import FolderPlace

BATCH, DIM, CONTEXT = 16, 16, 12


def engine(world: World, *, optim: dict[str, Any] | None = None) -> TorchEngine:
    torch.manual_seed(0)
    config = DualEncoderConfig.model_validate(TINY_MODEL)
    model = DualEncoder(config.open_clip_config(image_size=32, context_length=CONTEXT))
    tree = {
        "name": "x", "steps": 1, "data": {"shards": "x"}, "model": TINY_MODEL,
        "loss": [{"type": "clip"}], "optim": optim or {"type": "lion"},
    }  # fmt: skip
    settings = validate_config(TrainConfig, tree, source="test").optim
    optimizer = build_optimizer(model.named_parameters(), settings)
    return TorchEngine(model, optimizer, TorchEngineConfig(precision="fp32"), world)


def count_bytes(world: World) -> dict[str, int]:
    """One step of the real engine; what it handed to each kind of collective."""
    counts = {"gathered": 0, "reduced": 0, "gradients": 0}
    made = engine(world)
    gather, reduce = dist.all_gather, dist.all_reduce

    def counted_gather(parts: list[torch.Tensor], own: torch.Tensor) -> object:
        counts["gathered"] += own.nbytes
        return gather(parts, own)

    def counted_reduce(tensor: torch.Tensor, **options: Any) -> object:
        counts["reduced"] += tensor.nbytes
        return reduce(tensor, **options)

    def counted_bucket(bucket: Any) -> torch.futures.Future[torch.Tensor]:
        counts["gradients"] += bucket.buffer().nbytes
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda f: f.value()[0] / world.size)

    if world.size > 1:
        made._wrapped.register_comm_hook(None, lambda state, bucket: counted_bucket(bucket))  # type: ignore[operator] # DDP's
    own = BATCH // world.size
    images = torch.randn(own, 3, 32, 32)
    output = made.forward([images], torch.randint(1, 99, (own, CONTEXT)))
    dist.all_gather, dist.all_reduce = counted_gather, counted_reduce  # type: ignore[assignment] # spied on
    try:
        ids = torch.arange(own) + world.rank * own
        loss = global_loss(output, ids, [ClipTerm()], progress=0.0, world=world, sample_ids=ids)
        dist.all_reduce = counted_reduce  # type: ignore[assignment] # of the backward pass of features
        grads = torch.autograd.grad(loss.total, [output.image, output.text], retain_graph=True)
        assert all(torch.isfinite(g).all() for g in grads)
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
    made.backward(loss.total)
    return counts


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 4])
def test_bytes_that_real_ranks_hand_over_are_those_of_the_formulas(size: int) -> None:
    parameters = sum(p.numel() for p in engine(World()).model.parameters())
    found = run_ranks(size, count_bytes) if size > 1 else [count_bytes(World())]
    for counts in found:
        if size == 1:
            assert counts == {"gathered": 0, "reduced": 0, "gradients": 0}
            continue
        assert counts["gathered"] == formulas.feature_bytes(BATCH, DIM, ranks=size)
        joined = formulas.joined_bytes(BATCH)
        assert counts["reduced"] == 2 * 4 * BATCH * DIM + joined  # as gather_traffic has it
        assert counts["gradients"] == formulas.gradient_bytes(parameters)


@pytest.mark.parametrize(("kind", "moments"), [("lion", 1), ("adamw", 2)])
@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_takes_the_bytes_of_the_formula(
    tmp_path: Path, kind: str, moments: int, ema: bool
) -> None:
    made = engine(World(), optim={"type": kind})
    for parameter in made.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step(None)
    state = made.model.state_dict()
    with open_writer(FolderPlace(tmp_path), keep=1, facts={}, world=World()) as writer:
        writer.save(1, made.state(), ema=state if ema else None, memory={})
        writer.finish()
    (folder,) = tmp_path.iterdir()
    found = sum(path.stat().st_size for path in folder.iterdir())
    expected = formulas.checkpoint_bytes(
        sum(tensor.numel() for tensor in state.values()), moments=moments, ema=ema
    )
    assert expected < found < expected + 64 * 1024  # names and headers


def test_gathering_sends_what_a_ring_of_that_many_ranks_must() -> None:
    assert formulas.ring_traffic(100, 1) == 0
    assert formulas.ring_traffic(100, 4) == 150
    assert formulas.gather_traffic(BATCH, DIM, ranks=1) == 0
    assert formulas.ring_loss_traffic(BATCH, DIM, ranks=1) == 0
    big = formulas.gather_traffic(2**16, 512, ranks=256)
    assert formulas.ring_loss_traffic(2**16, 512, ranks=256) < big


def simulated_goodput(times: Checkpointing, interval: float, *, segments: int) -> float:
    """A job that fails at random, step by step, for as many kept segments."""
    generator = np.random.default_rng(0)
    clock = 0.0
    for _ in range(segments):
        needed = interval + times.save
        while (until := generator.exponential(times.between_failures)) < needed:
            clock += until
            while (until := generator.exponential(times.between_failures)) < times.restart:
                clock += until
            clock += times.restart
        clock += needed
    return segments * interval / clock


def test_goodput_is_that_of_simulated_failures_and_best_at_dalys_interval() -> None:
    times = Checkpointing(save=20, restart=120, between_failures=3000)
    best = formulas.daly_interval(times)
    for interval in (best / 4, best, best * 4):
        simulated = simulated_goodput(times, interval, segments=20_000)
        assert formulas.goodput(times, interval) == pytest.approx(simulated, rel=0.02)
    grid = np.geomspace(best / 10, best * 10, 400)
    values = [formulas.goodput(times, float(interval)) for interval in grid]
    assert formulas.goodput(times, best) >= max(values) - 1e-4
    assert formulas.young_interval(times) == pytest.approx(math.sqrt(2 * 20 * 3000))
    assert formulas.goodput(times, 1e9) == 0


def test_an_example_of_the_checkpoint_interval_by_hand() -> None:
    """1,024 GPUs of 50,000 hours fail every 49 hours in all; 1.2 GB at 1 GB/s."""
    mean = formulas.mean_seconds_between_failures(1024, gpu_hours=50_000)
    assert mean == pytest.approx(175_781, rel=1e-4)
    times = Checkpointing(save=1.2, restart=300, between_failures=mean)
    assert formulas.young_interval(times) == pytest.approx(649.5, rel=1e-3)
    assert formulas.goodput(times, formulas.daly_interval(times)) > 0.99


def test_search_and_serving_grow_as_they_must() -> None:
    vectors, codes = formulas.search_bytes(10**9, 512)
    assert vectors == 2_048 * 10**9
    assert codes == 80 * 10**9
    assert formulas.milvus_bytes(10**9, 512) == 4_608 * 10**9
    assert formulas.scan_seconds(2e9, bandwidth=1e11) == pytest.approx(0.02)
    assert formulas.replicas(100, each=10, utilisation=0.5) == 20
    assert formulas.replicas(0.1, each=10) == 1
    assert formulas.loss_flops(2, 3, ranks=1) == 96
    assert formulas.loss_flops(8, 3, ranks=4) == 4 * 2 * 2 * 8 * 3
    assert formulas.loss_memory(8, 4) == 4 * (4 * 8 * 4 + 4 * 8 + 3 * 64)


@pytest.mark.parametrize("verb", ["train", "search", "serve"])
def test_every_plan_prints_a_table(verb: str) -> None:
    done = CliRunner().invoke(app, ["scale", verb], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert {"train": "1024", "search": "10,000,000,000", "serve": "10,000"}[verb] in done.output
    # SCALE.md shows the same rows.
    page = (Path(__file__).parents[3] / "k8s/SCALE.md").read_text()
    _, _, block = page.partition(f"```\nvlm scale {verb}")
    shown = [line.split() for line in block.partition("```")[0].splitlines()[2:]]
    printed = [line.replace("│", " ").split() for line in done.output.splitlines() if "│" in line]
    assert shown
    assert shown == printed
