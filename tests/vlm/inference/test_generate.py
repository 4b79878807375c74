"""The four searches against what they must equal."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.support import TINY_COCA
from vlm.inference import (
    BeamSearch,
    ContrastiveSearch,
    GreedySearch,
    NucleusSampling,
    generate,
)
from vlm.models import CoCa, CocaConfig

LENGTH = 8
STRATEGIES = {
    "greedy": GreedySearch(),
    "beam": BeamSearch(width=3),
    "nucleus": NucleusSampling(p=0.9),
    "contrastive": ContrastiveSearch(candidates=3, alpha=0.4),
}


def build(vocab: int, *, seed: int = 0, sharpness: float = 8.0) -> CoCa:
    """A decoder of random but decided opinions."""
    torch.manual_seed(seed)
    text = {**TINY_COCA["text"], "vocab_size": vocab}
    model = CoCa(
        CocaConfig.model_validate({**TINY_COCA, "text": text}), image_size=16, context_length=LENGTH
    )
    with torch.no_grad():
        for parameter in model.text.parameters():
            if parameter.ndim > 1:
                parameter.mul_(sharpness)
    return model.double().eval()


def image_rows(model: CoCa, count: int, *, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return 3 * model.image_rows(images)


def write(
    model: CoCa, rows: Tensor, strategy: Any, *, max_tokens: int = LENGTH - 1, seed: int = 0
) -> Tensor:
    vocab = len(model.text.vocabulary)
    return generate(
        model, rows, strategy, start=vocab - 2, end=vocab - 1, max_tokens=max_tokens,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def log_likelihoods(model: CoCa, rows: Tensor, token_ids: Tensor) -> Tensor:
    """Of each token after the first, by one pass without a cache."""
    with torch.no_grad():
        _, text_rows = model.text.read(token_ids)
        table = model.logits(model.text.look(text_rows, rows)).log_softmax(dim=2)
    return table[:, :-1].gather(2, token_ids[:, 1:, None])[:, :, 0]


@pytest.mark.parametrize("parts", [[1] * LENGTH, [3, 1, 4], [LENGTH]])
def test_steps_with_a_cache_give_the_states_of_the_whole(parts: list[int]) -> None:
    model = build(20)
    rows = image_rows(model, 3)
    token_ids = torch.randint(0, 20, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, text_rows = model.text.read(token_ids)
        expected = model.text.look(text_rows, rows)
        state, found = model.begin(rows), []
        for part in token_ids.split(parts, dim=1):
            hidden, state = model.step(part, state)
            found.append(hidden)
    assert state.length == LENGTH
    assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-12)
    assert_close(model.logits(torch.cat(found, dim=1)), model.logits(expected), rtol=0, atol=1e-10)


def test_greedy_takes_the_likeliest_token_of_an_uncached_pass_at_every_step() -> None:
    model = build(20)
    rows = image_rows(model, 6)
    read = torch.full((6, 1), 18)
    done = torch.zeros(6, dtype=torch.bool)
    for _ in range(LENGTH - 1):
        with torch.no_grad():
            _, text_rows = model.text.read(read)
            picked = model.logits(model.text.look(text_rows, rows)[:, -1]).argmax(dim=1)
        read = torch.cat([read, picked.masked_fill(done, 0)[:, None]], dim=1)
        done |= picked == 19
    found = write(model, rows, GreedySearch())
    assert torch.equal(found, read[:, 1:])
    assert len(found.unique(dim=0)) > 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_beam_of_one_is_greedy(seed: int, penalty: float) -> None:
    model = build(7, seed=seed)
    rows = image_rows(model, 8)
    beam = BeamSearch(width=1, length_penalty=penalty)
    assert torch.equal(write(model, rows, beam), write(model, rows, GreedySearch()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
def test_a_wide_beam_finds_the_best_of_all_captions(seed: int, penalty: float) -> None:
    vocab, longest = 4, 4
    model = build(vocab, seed=seed, sharpness=6.0)
    rows = image_rows(model, 5)
    by_length: list[list[tuple[int, ...]]] = [
        [(*words, vocab - 1) for words in itertools.product(range(vocab - 1), repeat=length)]
        for length in range(longest)
    ]
    by_length[-1] += itertools.product(range(vocab - 1), repeat=longest)
    found = write(model, rows, BeamSearch(width=256, length_penalty=penalty), max_tokens=longest)
    for row, ids in zip(rows, found.tolist(), strict=True):
        scores = {}
        for captions in by_length:
            read = torch.tensor([[vocab - 2, *caption] for caption in captions])
            likelihoods = log_likelihoods(model, row.expand(len(read), -1, -1), read).sum(dim=1)
            for caption, likelihood in zip(captions, likelihoods.tolist(), strict=True):
                scores[caption] = likelihood / len(caption) ** penalty
        best = max(scores, key=scores.__getitem__)
        assert tuple(ids[: len(best)]) == best
        assert not any(ids[len(best) :])


@pytest.mark.parametrize("width", [2, 4, 8])
def test_a_wider_beam_is_no_worse_here_and_never_repeats_a_row(width: int) -> None:
    model = build(7, seed=1)
    rows = image_rows(model, 4)

    def score(strategy: Any) -> Tensor:
        found = write(model, rows, strategy, max_tokens=3)
        read = torch.cat([torch.full((4, 1), 5), found], dim=1)
        real = (found == 6).cumsum(dim=1) - (found == 6).long() == 0
        return (log_likelihoods(model, rows, read) * real).sum(dim=1)

    wide = score(BeamSearch(width=width, length_penalty=0.0))
    best = score(BeamSearch(width=343, length_penalty=0.0))
    assert bool((wide <= best + 1e-12).all())


@pytest.mark.parametrize("strategy", [
    NucleusSampling(p=0.0), NucleusSampling(p=1e-9), NucleusSampling(p=1.0, temperature=1e-6),
    ContrastiveSearch(candidates=4, alpha=0.0), ContrastiveSearch(candidates=1, alpha=0.9),
], ids=str)  # fmt: skip
def test_the_limits_of_the_searches_are_greedy(strategy: Any) -> None:
    model = build(20, seed=2)
    rows = image_rows(model, 6)
    assert torch.equal(write(model, rows, strategy), write(model, rows, GreedySearch()))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_row_does_not_depend_on_its_companions(name: str) -> None:
    model = build(20, seed=4)
    rows = image_rows(model, 7)
    whole = write(model, rows, STRATEGIES[name])
    assert torch.equal(write(model, rows[:3], STRATEGIES[name]), whole[:3])
    if name != "nucleus":  # which draws for its rows in turn
        order = torch.tensor([4, 0, 6, 2])
        assert torch.equal(write(model, rows[order], STRATEGIES[name]), whole[order])
        alone = [write(model, row[None], STRATEGIES[name]) for row in rows]
        assert torch.equal(torch.cat(alone), whole)


@pytest.mark.parametrize("name", STRATEGIES)
def test_after_the_end_mark_there_are_zeros(name: str) -> None:
    model = build(4, seed=5, sharpness=3.0)
    found = write(model, image_rows(model, 30), STRATEGIES[name])
    ended = (found == 3).any(dim=1)
    assert ended.any()
    for ids in found[ended].tolist():
        assert not any(ids[ids.index(3) + 1 :])


def test_sampling_is_decided_by_the_seed_and_follows_the_probabilities() -> None:
    model = build(5, seed=6, sharpness=4.0)
    rows = image_rows(model, 1).expand(4000, -1, -1)
    found = write(model, rows, NucleusSampling(p=1.0), max_tokens=1, seed=9)
    assert torch.equal(found, write(model, rows, NucleusSampling(p=1.0), max_tokens=1, seed=9))
    assert not torch.equal(found, write(model, rows, NucleusSampling(p=1.0), max_tokens=1, seed=8))
    with torch.no_grad():
        hidden, _ = model.step(torch.tensor([[3]]), model.begin(rows[:1]))
        expected = model.logits(hidden[:, -1]).softmax(dim=1)[0]
    shares = found[:, 0].bincount(minlength=5) / 4000
    # Four standard deviations of a share of 4,000 draws are at most 0.032.
    assert_close(shares.double(), expected, rtol=0, atol=0.032)


def test_the_nucleus_holds_the_fewest_tokens_that_reach_p() -> None:
    model = build(12, seed=6, sharpness=4.0)
    rows = image_rows(model, 1)
    with torch.no_grad():
        hidden, _ = model.step(torch.tensor([[10]]), model.begin(rows))
        ordered = model.logits(hidden[:, -1]).softmax(dim=1)[0].sort(descending=True)
    inside = int((ordered.values.cumsum(0) < 0.7).sum()) + 1
    assert 1 < inside < 12
    found = write(model, rows.expand(3000, -1, -1), NucleusSampling(p=0.7), max_tokens=1)
    assert set(found[:, 0].tolist()) == set(ordered.indices[:inside].tolist())


def test_contrastive_search_is_its_formula_step_by_step() -> None:
    model = build(12, seed=7, sharpness=4.0)
    alpha, count = 0.7, 4
    rows = image_rows(model, 5)
    found = write(model, rows, ContrastiveSearch(candidates=count, alpha=alpha))
    greedy = write(model, rows, GreedySearch())
    assert not torch.equal(found, greedy)
    for row, ids in zip(rows, found.tolist(), strict=True):
        read = [10]
        for picked in ids:
            scores = _contrastive_scores(model, row[None], read, count, alpha)
            assert picked == max(scores, key=scores.__getitem__)
            read.append(picked)
            if picked == 11:
                break


def _contrastive_scores(
    model: CoCa, row: Tensor, read: list[int], count: int, alpha: float
) -> dict[int, float]:
    def states(ids: list[int]) -> Tensor:
        with torch.no_grad():
            _, text_rows = model.text.read(torch.tensor([ids]))
            return model.text.look(text_rows, row)[0]

    likely = model.logits(states(read)[-1:]).softmax(dim=1)[0].topk(count)
    scores = {}
    for p, token in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
        hidden = torch.nn.functional.normalize(states([*read, token])[1:], dim=1)
        before = hidden[:-1] @ hidden[-1]
        scores[token] = (1 - alpha) * p - alpha * (float(before.max()) if len(before) else 0.0)
    return scores


def test_sampling_without_a_generator_is_refused() -> None:
    model = build(5)
    with pytest.raises(ValueError, match="give a generator"):
        generate(model, image_rows(model, 1), NucleusSampling(), start=3, end=4, max_tokens=2)
