"""From the rows of images to token ids of captions: greedy, beam, nucleus and contrastive search.

All four read one token a step, from a state of keys and values; a row of a batch depends on nothing
but itself, and the same arguments always give the same ids.
"""

from collections.abc import Callable
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.models.caption_decoder import DecoderState

__all__ = [
    "BeamSearch",
    "ContrastiveSearch",
    "GreedySearch",
    "NucleusSampling",
    "Strategy",
    "WritingModel",
    "generate",
]

_PADDING = 0


class GreedySearch(Config):
    """The likeliest token at every step."""

    type: Literal["greedy"] = "greedy"


class BeamSearch(Config):
    """The likeliest captions of `width` that are followed at a time; best for short captions."""

    type: Literal["beam"] = "beam"
    width: int = Field(4, ge=1)
    length_penalty: float = Field(1.0, ge=0)
    """Log-likelihoods are divided by the number of tokens to this power; 0 favours short ones."""


class NucleusSampling(Config):
    """Draws from the fewest likeliest tokens that together hold `p` (arXiv:1904.09751)."""

    type: Literal["nucleus"] = "nucleus"
    p: float = Field(0.9, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)


class ContrastiveSearch(Config):
    """Likely tokens whose state is unlike those of the tokens before (arXiv:2202.06417).

    Takes argmax over the `candidates` likeliest tokens v of (1 - alpha) p(v) - alpha max_j
    cos(h_v, h_j), with h the last state after a token and j over the caption so far, without the
    start mark and the image.
    """

    type: Literal["contrastive"] = "contrastive"
    candidates: int = Field(5, ge=1)
    alpha: float = Field(0.5, ge=0, le=1)


Strategy = Annotated[
    GreedySearch | BeamSearch | NucleusSampling | ContrastiveSearch, Field(discriminator="type")
]


@runtime_checkable
class WritingModel(Protocol):
    """What a search asks of a model; `vlm.models.CoCa` is one."""

    def begin(self, image_rows: Float[Tensor, "batch place rows_width"]) -> DecoderState: ...

    def step(
        self, token_ids: Int64[Tensor, "batch token"], state: DecoderState
    ) -> tuple[Float[Tensor, "batch token width"], DecoderState]: ...

    def logits(self, hidden: Float[Tensor, "*row width"]) -> Float[Tensor, "*row vocab"]: ...


@torch.inference_mode()
def generate(
    model: WritingModel,
    image_rows: Float[Tensor, "batch place rows_width"],
    strategy: GreedySearch | BeamSearch | NucleusSampling | ContrastiveSearch,
    *,
    start: int,
    end: int,
    max_tokens: int,
    generator: torch.Generator | None = None,
) -> Int64[Tensor, "batch max_tokens"]:
    """Write one caption for each image.

    Args:
        model: In evaluation mode.
        image_rows: What the model's `image_rows` returned.
        strategy: How tokens are chosen.
        start: Id of the start mark, which is read first and never returned.
        end: Id of the end mark, which ends a caption.
        max_tokens: Longest caption, with its end mark; below the model's context length.
        generator: For `NucleusSampling`, on the CPU. It draws `max_tokens` numbers for each row in
            turn, so what a row draws does not depend on the rows behind it.

    Returns:
        Ids up to and with the end mark, then zeros; without one where `max_tokens` came first.

    Raises:
        ValueError: If `NucleusSampling` lacks a generator.
    """
    tokens = torch.full((len(image_rows), 1), start, device=image_rows.device)
    state = model.begin(image_rows)
    if isinstance(strategy, BeamSearch):
        return _beam_search(model, state, tokens, strategy, end, max_tokens)
    if isinstance(strategy, ContrastiveSearch):
        return _contrastive_search(model, state, tokens, strategy, end, max_tokens)
    if isinstance(strategy, NucleusSampling):
        if generator is None:
            message = "nucleus sampling draws at random: give a generator"
            raise ValueError(message)
        draws = [torch.rand(max_tokens, generator=generator) for _ in range(len(tokens))]
        uniform = torch.stack(draws).to(image_rows.device) if draws else torch.empty(0, max_tokens)

        def sample(logits: Tensor, position: int) -> Tensor:
            return _nucleus(logits, strategy, uniform[:, position])

        return _token_by_token(model, state, tokens, sample, end, max_tokens)
    return _token_by_token(
        model, state, tokens, lambda logits, _: logits.argmax(dim=1), end, max_tokens
    )


def _token_by_token(
    model: WritingModel,
    state: DecoderState,
    tokens: Tensor,
    pick: Callable[[Tensor, int], Tensor],
    end: int,
    max_tokens: int,
) -> Tensor:
    written = tokens.new_full((len(tokens), max_tokens), _PADDING)
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for position in range(max_tokens):
        hidden, state = model.step(tokens, state)
        picked = pick(model.logits(hidden[:, -1]), position).masked_fill(done, _PADDING)
        written[:, position] = picked
        done = done | (picked == end)
        if done.all():
            break
        tokens = picked[:, None]
    return written


def _nucleus(
    logits: Float[Tensor, "batch vocab"],
    strategy: NucleusSampling,
    uniform: Float[Tensor, " batch"],
) -> Int64[Tensor, " batch"]:
    """The token at which the cumulative probability of the nucleus passes a number in [0, 1)."""
    probabilities = (logits / strategy.temperature).softmax(dim=1)
    ordered, ids = probabilities.sort(dim=1, descending=True, stable=True)
    outside = ordered.cumsum(dim=1) - ordered >= strategy.p
    outside[:, 0] = False
    cumulative = ordered.masked_fill(outside, 0.0).cumsum(dim=1)
    aim = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    rank = (cumulative <= aim).sum(dim=1, keepdim=True)
    # Rounding may carry the aim up to the whole mass; the last token inside is then meant.
    rank = rank.minimum((~outside).sum(dim=1, keepdim=True) - 1)
    return ids.gather(1, rank)[:, 0]


def _beam_search(
    model: WritingModel,
    state: DecoderState,
    tokens: Tensor,
    strategy: BeamSearch,
    end: int,
    max_tokens: int,
) -> Tensor:
    """Finished captions stay in the beam at their score and go on only as themselves.

    So the best of everything seen is kept whatever its length, a beam of 1 is greedy search, and
    one that is wide enough for all captions is exhaustive.
    """
    batch, width = len(tokens), strategy.width
    first_row = torch.arange(batch, device=tokens.device)[:, None] * width  # [batch 1]
    state = state.rows(torch.arange(batch, device=tokens.device).repeat_interleave(width))
    tokens = tokens.repeat_interleave(width, dim=0)
    written = tokens.new_full((batch, width, max_tokens), _PADDING)
    lengths = tokens.new_zeros(batch, width)
    done = torch.zeros(batch, width, dtype=torch.bool, device=tokens.device)
    sums: Tensor | None = None
    for position in range(max_tokens):
        hidden, state = model.step(tokens, state)
        steps = model.logits(hidden[:, -1]).log_softmax(dim=1).unflatten(0, (batch, width))
        vocab = steps.shape[2]
        if sums is None:  # all hypotheses are equal still: only the first counts
            sums = steps.new_full((batch, width), -torch.inf)
            sums[:, 0] = 0.0
        steps = steps.masked_fill(done[:, :, None], -torch.inf)
        steps[:, :, _PADDING] = steps[:, :, _PADDING].masked_fill(done, 0.0)
        candidates = sums[:, :, None] + steps  # [batch width vocab]
        lengths = lengths + (~done).long()
        scores = candidates / (lengths[:, :, None] ** strategy.length_penalty)
        best = scores.flatten(1).topk(width, dim=1).indices  # [batch width], best first
        parents, picked = best // vocab, best % vocab
        sums = candidates.flatten(1).gather(1, best)
        lengths, done = lengths.gather(1, parents), done.gather(1, parents)
        written = written.gather(1, parents[:, :, None].expand(-1, -1, max_tokens))
        written[:, :, position] = picked
        done = done | (picked == end)
        if (done | sums.isneginf()).all():
            break
        state = state.rows((first_row + parents).flatten())
        tokens = picked.reshape(-1, 1)
    return written[:, 0]


def _contrastive_search(
    model: WritingModel,
    state: DecoderState,
    tokens: Tensor,
    strategy: ContrastiveSearch,
    end: int,
    max_tokens: int,
) -> Tensor:
    """One step of the batch for each candidate; the state of the chosen one is kept."""
    batch = len(tokens)
    written = tokens.new_full((batch, max_tokens), _PADDING)
    done = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    hidden, state = model.step(tokens, state)
    last = hidden[:, -1]  # [batch width]
    before: list[Tensor] = []
    for position in range(max_tokens):
        probabilities = model.logits(last).softmax(dim=1)
        count = min(strategy.candidates, probabilities.shape[1])
        likely, ids = probabilities.topk(count, dim=1)  # [batch candidate]
        rows = torch.arange(batch, device=tokens.device)
        hidden, wide = model.step(
            ids.reshape(-1, 1), state.rows(rows.repeat_interleave(count))
        )  # [batch * candidate 1 width]
        units = F.normalize(hidden[:, -1], dim=1).unflatten(0, (batch, count))
        score = (1 - strategy.alpha) * likely
        if before:
            cosines = units @ torch.stack(before, dim=2)  # [batch candidate position]
            score = score - strategy.alpha * cosines.amax(dim=2)
        chosen = score.argmax(dim=1)
        picked = ids.gather(1, chosen[:, None])[:, 0].masked_fill(done, _PADDING)
        written[:, position] = picked
        done = done | (picked == end)
        if done.all():
            break
        kept = rows * count + chosen
        state, last = wide.rows(kept), hidden[kept, -1]
        before.append(units[rows, chosen])
    return written
