"""W ranks on their parts of B samples, equal or not, give what one process gives on B."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from pydantic import TypeAdapter
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from tests.distributed import run_ranks
from tests.support import TINY_MODEL, unit_rows
from vlm.distributed import World, any_rank, gather_counts, gather_rows, sum_over_ranks
from vlm.errors import DataError
from vlm.losses import LossTerm
from vlm.models import DualEncoder, DualEncoderConfig
from vlm.train.memory import LossMemory
from vlm.train.objective import Objective, global_loss
from vlm.types import Batch, DualEncoderOutput

LOSSES: dict[str, list[dict[str, Any]]] = {
    "clip": [{"type": "clip"}],
    "clip_mask": [{"type": "clip", "same_group": "mask", "label_smoothing": 0.1}],
    "siglip": [{"type": "siglip"}],
    "gap": [{"type": "alignment"}, {"type": "uniformity"}, {"type": "cross_uniformity"},
            {"type": "centroid_uniformity"}],
    "dcl": [{"type": "dcl", "weight_sigma": 0.5}],
    "cyclip": [{"type": "clip"}, {"type": "cyclip"}],
    "soft": [{"type": "soft_clip", "similarity": "own"}, {"type": "distillation", "weight": 2}],
    "labels": [{"type": "soft_clip", "similarity": "labels"}],
    "masked": [{"type": "clip", "false_negatives": {"by": "either", "cosine": 0.3}}],
    "sogclr": [{"type": "sogclr", "gamma": 0.4}],
    "isogclr": [{"type": "isogclr", "gamma": 0.4, "init_temperature": 0.1}],
    "fastclip_v3": [{"type": "fastclip_v3", "gamma": 0.4}],
    "guarded": [{"type": "clip"}, {"type": "alignment", "weight": 2, "guard": {"gap_floor": 1.9}}],
    "sum": [{"type": "clip"}, {"type": "siglip", "weight": 0.3}, {"type": "alignment", "weight": 2},
            {"type": "uniformity", "weight": 0.5}],
}  # fmt: skip
BATCH = 12
SAMPLE_IDS = torch.arange(BATCH) * 7919 - 30_000
LABEL_IDS = torch.tensor([[row % 5, row // 4 + 3, -1] for row in range(BATCH)])


def build() -> DualEncoder:
    torch.manual_seed(5)
    config = DualEncoderConfig.model_validate({**TINY_MODEL, "init_logit_bias": -2.0})
    return DualEncoder(config.open_clip_config(image_size=32, context_length=12)).double()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
    token_ids = torch.randint(1, 1000, (BATCH, 12), generator=generator)
    groups = torch.tensor([0, 1, 2, 0, 3, 4, 5, 1, 6, 7, 8, 0])
    return images, token_ids, groups


def own_rows(world: World, counts: Sequence[int] | None, total: int = BATCH) -> slice:
    if counts is None:
        return slice(world.rank * total // world.size, (world.rank + 1) * total // world.size)
    return slice(sum(counts[: world.rank]), sum(counts[: world.rank + 1]))


def teacher(world: World, counts: Sequence[int] | None = None) -> DualEncoderOutput:
    own = own_rows(world, counts)
    return DualEncoderOutput(
        image=unit_rows(BATCH, 5, seed=1)[own],
        text=unit_rows(BATCH, 5, seed=2)[own],
        logit_scale=torch.tensor([9.0], dtype=torch.float64),
    )


def step(
    world: World, names: list[str], counts: Sequence[int] | None = None
) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    results = {}
    images, token_ids, groups = inputs()
    own = own_rows(world, counts)
    for name in names:
        model = build()
        wrapped = DistributedDataParallel(model) if world.size > 1 else model
        terms = [TypeAdapter(LossTerm).validate_python(tree) for tree in LOSSES[name]]
        more: dict[str, Any] = {
            "progress": 0.5, "world": world, "counts": counts, "sample_ids": SAMPLE_IDS[own],
            "memory": LossMemory(terms, SAMPLE_IDS.numpy(), world),
            "teacher": teacher(world, counts), "label_ids": LABEL_IDS[own],
        }  # fmt: skip
        with torch.no_grad():  # a step before, so that there is something to remember
            first = build()(images[own].flip(3), token_ids[own].roll(1, 1))
            global_loss(first, groups[own], terms, **more)
        output = wrapped(images[own], token_ids[own])
        loss = global_loss(output, groups[own], terms, **more)
        # Every parameter takes part, as data parallelism wants, whatever the loss uses.
        used = sum(0.0 * p.sum() for p in wrapped.parameters())
        (loss.total + used).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results[name] = (float(loss.total.detach()), gradients)
    return results


def steps(world: World, splits: list[Sequence[int] | None]) -> list[Any]:
    compare_with_open_clip(world)
    return [step(world, list(LOSSES), counts) for counts in splits]


def compare_with_open_clip(world: World) -> None:
    """Our loss of all ranks, and the mean over ranks of theirs, each with its gradients."""
    own = slice(world.rank * 3, world.rank * 3 + 3)
    rows = [unit_rows(3 * world.size, 6, seed=seed)[own] for seed in (1, 2)]
    theirs: dict[str, Callable[..., torch.Tensor]] = {
        "clip": ClipLoss(
            local_loss=True, gather_with_grad=True, rank=world.rank, world_size=world.size
        ),
        "siglip": SigLipLoss(rank=world.rank, world_size=world.size),
    }
    for kind, their_loss in theirs.items():
        scalars = [torch.tensor([value], dtype=torch.float64) for value in (14.3, -3.0)]
        leaves = [leaf.clone().requires_grad_() for leaf in (*rows, *scalars)]
        image, text, scale, bias = leaves
        output = DualEncoderOutput(image=image, text=text, logit_scale=scale, logit_bias=bias)
        groups = torch.arange(own.start, own.stop)
        term = TypeAdapter(LossTerm).validate_python({"type": kind})
        ours = global_loss(output, groups, [term], progress=0.0, world=world).total
        gradients = torch.autograd.grad(ours, leaves)
        local = their_loss(image, text, scale, *([bias] if kind == "siglip" else []))
        found = torch.autograd.grad(local, leaves, allow_unused=True, materialize_grads=True)
        assert_close(ours, sum_over_ranks(local, world) / world.size, rtol=1e-9, atol=0)
        for mine, their in zip(gradients, found, strict=True):
            shared = mine.shape == (1,)  # of scale and bias, data parallelism takes the mean
            pair = (sum_over_ranks(g, world) if shared else g for g in (mine, their))
            assert_close(*pair, rtol=1e-6, atol=1e-12)


SPLITS: dict[int, list[Sequence[int] | None]] = {
    2: [None, (7, 5)],
    3: [(3, 8, 1)],  # one row has no negative of its own on its rank
}


@pytest.mark.distributed
@pytest.mark.parametrize("size", SPLITS)
def test_ranks_together_equal_one_process_and_open_clips_distributed_losses(size: int) -> None:
    expected = step(World(), list(LOSSES))
    for splits in run_ranks(size, steps, SPLITS[size]):
        for found in splits:
            for name in LOSSES:
                assert found[name][0] == pytest.approx(expected[name][0], rel=1e-6)
                assert found[name][1].keys() == expected[name][1].keys()
                for parameter, gradient in expected[name][1].items():
                    scale = float(gradient.abs().max()) + 1e-6
                    difference = (found[name][1][parameter] - gradient).abs().max() / scale
                    assert float(difference) < 1e-6, (name, parameter)


def miscounted(world: World) -> str:
    rows = torch.ones(2 + world.rank, 1)
    assert gather_counts(len(rows), world) == [2, 3]
    try:
        gather_rows(rows, world, counts=(3, 2))
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.distributed
def test_ranks_that_bring_other_rows_than_said_do_not_hang() -> None:
    assert run_ranks(2, miscounted) == [
        "rank 0 brings 2 rows, and counts=[3, 2]",
        "rank 1 brings 3 rows, and counts=[3, 2]",
    ]


def vote(world: World) -> tuple[bool, bool]:
    return any_rank(world.rank == 1, world), any_rank(False, world)


@pytest.mark.distributed
def test_a_flag_of_one_rank_reaches_all() -> None:
    assert run_ranks(2, vote) == [(True, False), (True, False)]


def test_statistics_have_gap_and_scale() -> None:
    images, token_ids, groups = inputs()
    output = build()(images, token_ids)
    term = TypeAdapter(LossTerm).validate_python({"type": "clip"})
    statistics = global_loss(output, groups, [term], progress=0.0, world=World()).statistics
    gap = (output.image.mean(0) - output.text.mean(0)).norm()
    assert_close(statistics["modality_gap"], gap.detach())
    assert float(statistics["logit_scale"]) == pytest.approx(1 / 0.07, rel=1e-5)


@pytest.mark.parametrize("name", ["dcl", "gap"])
def test_a_step_whose_samples_are_all_of_one_group_says_what_puts_them_together(name: str) -> None:
    images, token_ids, groups = inputs()
    terms = [TypeAdapter(LossTerm).validate_python(tree) for tree in LOSSES[name]]
    memory = LossMemory(terms, SAMPLE_IDS.numpy(), World())
    objective = Objective(terms, memory=memory, teacher=None, world=World())
    batch = Batch(images=images.byte(), token_ids=token_ids, sample_ids=SAMPLE_IDS,
                  group_ids=torch.zeros_like(groups))  # fmt: skip
    output = DualEncoderOutput(image=unit_rows(BATCH, 5), text=unit_rows(BATCH, 5, seed=1),
                               logit_scale=torch.ones(1))  # fmt: skip
    with pytest.raises(DataError, match=r"12 rows, all of one group. data.stream.group_field puts"):
        objective(output, batch, progress=0.0)


def test_several_views_give_the_mean_of_the_losses_of_each() -> None:
    images, token_ids, groups = inputs()
    others = [images.flip(-1), images.flip(-2)]
    terms = [TypeAdapter(LossTerm).validate_python(tree) for tree in LOSSES["sum"]]
    model = build()
    together = global_loss(
        model(images, token_ids, *others), groups, terms, progress=0.5, world=World()
    )
    apart = [
        global_loss(model(view, token_ids), groups, terms, progress=0.5, world=World())
        for view in (images, *others)
    ]
    assert_close(together.total, torch.stack([loss.total for loss in apart]).mean())
    # The figures of the log are those of the first view, as without others.
    assert_close(together.statistics, apart[0].statistics)


def views_loss(world: World) -> tuple[float, torch.Tensor]:
    images, token_ids, groups = inputs()
    own = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    model = build()
    wrapped = DistributedDataParallel(model) if world.size > 1 else model
    output = wrapped(images[own], token_ids[own], images.flip(-1)[own])
    terms = [TypeAdapter(LossTerm).validate_python(tree) for tree in LOSSES["clip"]]
    loss = global_loss(output, groups[own], terms, progress=0.5, world=world)
    used = sum(0.0 * p.sum() for p in wrapped.parameters())
    (loss.total + used).backward()
    gradient = dict(model.named_parameters())["text.token_embedding.weight"].grad
    assert isinstance(gradient, torch.Tensor)
    return float(loss.total.detach()), gradient.clone()


def test_views_on_several_ranks_equal_one_process() -> None:
    expected = views_loss(World())
    for found in run_ranks(3, views_loss):
        assert_close(found, expected, rtol=1e-5, atol=1e-6)  # losses are float32
