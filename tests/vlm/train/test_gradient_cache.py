"""Micro-batches give the gradients of the step that keeps everything, in the memory of one."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from open_clip.transformer import PatchDropout
from pydantic import TypeAdapter
from torch import Tensor, nn

from tests.distributed import run_ranks
from tests.vlm.train import test_coca_objective as coca
from tests.vlm.train import test_objective as dual
from vlm.distributed import World
from vlm.errors import VlmError
from vlm.losses import LossTerm
from vlm.models import CoCa, DualEncoder
from vlm.train.config import TorchEngineConfig
from vlm.train.engine import TorchEngine
from vlm.train.gradient_cache import backward_by_parts
from vlm.train.memory import LossMemory
from vlm.train.objective import global_loss
from vlm.types import CaptionSum, DualEncoderOutput, LossOutput

PARTS = 4  # of the global batch
TERMS: dict[str, Any] = {**dual.LOSSES, "coca": coca.TERMS, "views": dual.LOSSES["sum"]}
Found = dict[str, tuple[float, dict[str, Tensor]]]


def build(name: str) -> DualEncoder | CoCa:
    if name == "coca":
        return coca.build()
    model = dual.build()
    model.image.patch_dropout = PatchDropout(0.5)
    norm = model.text.ln_final
    assert isinstance(norm, nn.Module)
    model.text.ln_final = nn.Sequential(norm, nn.Dropout(0.3))
    return model


def read(name: str) -> tuple[list[Tensor], Tensor]:
    if name == "coca":
        images, token_ids = coca.inputs()
        return [images], token_ids
    images, token_ids, _ = dual.inputs()
    return [images, images.flip(-1)] if name == "views" else [images], token_ids


def steps(
    world: World, names: list[str], keep_everything: bool, split: Sequence[int] = (PARTS,)
) -> Found:
    """Loss and gradients of one step of each loss, by the cache or by one great graph.

    `split` says how many of the micro-batches each rank has.
    """
    found: Found = {}
    for name in names:
        views, token_ids = read(name)
        total = len(token_ids)
        model, size = build(name), total // PARTS
        counts = [size * parts for parts in split]
        engine = TorchEngine(
            model, torch.optim.SGD(model.parameters()), TorchEngineConfig(precision="fp32"), world
        )
        terms = [TypeAdapter(LossTerm).validate_python(tree) for tree in TERMS[name]]
        own = dual.own_rows(world, counts)
        groups = torch.arange(total) if name == "coca" else dual.inputs()[2]
        ids = dual.SAMPLE_IDS[:total]

        def forward(
            index: int,
            engine: TorchEngine = engine,
            views: list[Tensor] = views,
            token_ids: Tensor = token_ids,
            size: int = size,
        ) -> DualEncoderOutput:
            part = slice(index * size, (index + 1) * size)
            torch.manual_seed(index)
            return engine.forward([view[part] for view in views], token_ids[part])

        evaluate = partial(
            loss_of, groups[own], ids[own], terms, world, counts, name,
            LossMemory(terms, ids.numpy(), world),
        )  # fmt: skip
        mine = range(sum(split[: world.rank]), sum(split[: world.rank + 1]))
        forwards = [partial(forward, index) for index in mine]
        if keep_everything:
            loss = evaluate(joined([forward() for forward in forwards]), None)
            loss.total.backward()
        else:
            loss = backward_by_parts(engine, forwards, evaluate)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[name] = (float(loss.total.detach()), gradients)
    return found


def loss_of(
    groups: Tensor,
    ids: Tensor,
    terms: list[LossTerm],
    world: World,
    counts: Sequence[int],
    name: str,
    memory: LossMemory,
    output: DualEncoderOutput,
    captions: CaptionSum | None,
) -> LossOutput:
    return global_loss(
        output, groups, terms, progress=0.5, world=world, sample_ids=ids, memory=memory,
        teacher=None if name == "coca" else dual.teacher(world, counts), captions=captions,
        counts=counts, label_ids=dual.LABEL_IDS[dual.own_rows(world, counts)],
    )  # fmt: skip


def joined(parts: list[DualEncoderOutput]) -> DualEncoderOutput:
    def cat(pick: Callable[[DualEncoderOutput], Tensor]) -> Tensor:
        return torch.cat([pick(part) for part in parts])

    rows = [part.captions for part in parts if part.captions is not None]
    first = rows[0] if rows else None
    return DualEncoderOutput(
        image=cat(lambda part: part.image),
        text=cat(lambda part: part.text),
        logit_scale=parts[0].logit_scale,
        logit_bias=parts[0].logit_bias,
        more_images=tuple(map(torch.cat, zip(*(part.more_images for part in parts), strict=True))),
        captions=None if first is None else type(first)(
            hidden=torch.cat([row.hidden for row in rows]),
            targets=torch.cat([row.targets for row in rows]),
            vocabulary=first.vocabulary,
        ),
    )  # fmt: skip


def assert_equal(found: Found, expected: Found, tolerance: float) -> None:
    for name, (total, gradients) in expected.items():
        assert found[name][0] == pytest.approx(total, rel=1e-6), name
        assert found[name][1].keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            scale = float(gradient.abs().max()) + 1e-6
            difference = (found[name][1][parameter] - gradient).abs().max() / scale
            assert float(difference) < tolerance, (name, parameter)


@pytest.mark.distributed
def test_gradients_equal_those_of_the_whole_batch_for_every_loss_with_dropout() -> None:
    names = list(TERMS)
    expected = steps(World(), names, True)
    assert_equal(steps(World(), names, False), expected, 1e-6)
    for even, uneven in run_ranks(2, both_splits, names):
        assert_equal(even, expected, 1e-6)
        assert_equal(uneven, expected, 1e-6)


def both_splits(world: World, names: list[str]) -> tuple[Found, Found]:
    return steps(world, names, False, (2, 2)), steps(world, names, False, (3, 1))


class _Live:
    """Bytes kept for backward now, and the most there were."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Tensor:
        kept = tensor.detach().view_as(tensor)
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(kept, self._release, size)
        return kept

    def _release(self, size: int) -> None:
        self.now -= size


def test_what_is_kept_for_backward_does_not_grow_with_the_batch() -> None:
    term = TypeAdapter(LossTerm).validate_python({"type": "clip"})
    images, token_ids, _ = dual.inputs()
    most = []
    for count in (2, 8):
        model = dual.build()
        engine = TorchEngine(
            model, torch.optim.SGD(model.parameters()), TorchEngineConfig(precision="fp32"), World()
        )
        live = _Live()
        with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda tensor: tensor):
            backward_by_parts(
                engine,
                [lambda: engine.forward([images], token_ids)] * count,  # noqa: B023 - called here
                lambda output, _: global_loss(
                    output, torch.arange(len(output.image)), [term], progress=0.0, world=World()
                ),
            )
        most.append(live.most)
    assert 100_000 < most[1] < 1.02 * most[0]


def test_a_model_that_embeds_otherwise_the_second_time_is_an_error() -> None:
    model = dual.build()
    engine = TorchEngine(
        model, torch.optim.SGD(model.parameters()), TorchEngineConfig(precision="fp32"), World()
    )
    images, token_ids, _ = dual.inputs()
    term = TypeAdapter(LossTerm).validate_python({"type": "clip"})
    turns = iter(range(4))

    def forward() -> DualEncoderOutput:
        return engine.forward([images.roll(next(turns), 0)], token_ids)

    with pytest.raises(VlmError, match="embedded otherwise the second time, by 0.*micro_batch"):
        backward_by_parts(
            engine, [forward, forward],
            lambda output, _: global_loss(
                output, torch.arange(24), [term], progress=0.0, world=World()
            ),
        )  # fmt: skip


def test_running_averages_change_once_a_step() -> None:
    model = dual.build()
    engine = TorchEngine(
        model, torch.optim.SGD(model.parameters()), TorchEngineConfig(precision="fp32"), World()
    )
    norm = nn.BatchNorm2d(3).double()
    images, token_ids, groups = dual.inputs()
    model.image = nn.Sequential(norm, model.image)
    term = TypeAdapter(LossTerm).validate_python({"type": "clip"})
    forwards: list[Any] = [
        partial(engine.forward, [images[part]], token_ids[part])
        for part in (slice(0, 6), slice(6, 12))
    ]
    evaluate = partial(loss_of, groups, dual.SAMPLE_IDS, [term], World(), [12], "clip",
                       LossMemory([term], dual.SAMPLE_IDS.numpy(), World()))  # fmt: skip
    backward_by_parts(engine, forwards, evaluate)
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 2
