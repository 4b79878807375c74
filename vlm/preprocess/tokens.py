"""From captions to token ids."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.types import Tokenize

__all__ = [
    "TokenizerConfig",
    "build_detokenizer",
    "build_tokenizer",
    "tokenizer_vocabulary",
    "trim_padding",
]

_WORDS_REMEMBERED = 65_536


class TokenizerConfig(Config):
    """open_clip's byte-pair tokenizer, which needs no download."""

    type: Literal["simple"] = "simple"
    context_length: int = Field(77, ge=4)
    """Positions of a tokenized caption, start and end marks included."""


def build_tokenizer(config: TokenizerConfig) -> Tokenize:
    """The function from captions to padded token ids; long captions are cut, keeping the end mark.

    The ids are those of open_clip's tokenizer. Deterministic, and safe to call from threads.
    """
    from open_clip.tokenizer import SimpleTokenizer  # noqa: PLC0415 - seconds, and data verbs skip it

    tokenizer = SimpleTokenizer(context_length=config.context_length)
    return partial(_tokenize, tokenizer, {}, config.context_length)


def build_detokenizer(config: TokenizerConfig) -> Callable[[list[int]], str]:
    """The function from token ids to text, up to the end mark if there is one; lower case."""
    from open_clip.tokenizer import SimpleTokenizer  # noqa: PLC0415 - seconds, and data verbs skip it

    return partial(_detokenize, SimpleTokenizer(context_length=config.context_length))


def tokenizer_vocabulary(config: TokenizerConfig) -> Path:
    """The file of merges that the tokenizer was built from."""
    from open_clip.tokenizer import default_bpe  # noqa: PLC0415 - seconds, and data verbs skip it

    return Path(default_bpe())


def _tokenize(
    tokenizer: Any, remembered: dict[str, list[int]], context_length: int, captions: list[str]
) -> Int64[Tensor, "batch token"]:
    ids = np.zeros((len(captions), context_length), dtype=np.int64)
    for row, caption in zip(ids, captions, strict=True):
        words = tokenizer.pat.findall(_cleaned(caption, tokenizer.clean_fn))
        tokens = [tokenizer.sot_token_id]
        for word in words:
            known = remembered.get(word)
            tokens += _remember(tokenizer, remembered, word) if known is None else known
        del tokens[context_length - 1 :]
        tokens.append(tokenizer.eot_token_id)
        row[: len(tokens)] = tokens
    return torch.from_numpy(ids)


def _detokenize(tokenizer: Any, token_ids: list[int]) -> str:
    ends = token_ids.index(tokenizer.eot_token_id) if tokenizer.eot_token_id in token_ids else None
    words = [token for token in token_ids[:ends] if token != tokenizer.sot_token_id]
    text: str = tokenizer.decode(words)
    return text.strip()


def _cleaned(caption: str, clean: Callable[[str], str]) -> str:
    """What `clean` returns; repairs of Unicode and HTML find nothing to do in plain ASCII."""
    if caption.isascii() and caption.isprintable() and "&" not in caption:
        return " ".join(caption.split()).lower()
    return clean(caption)


def _remember(tokenizer: Any, remembered: dict[str, list[int]], word: str) -> list[int]:
    """Token ids of a word; no stream of odd words makes the memory grow without end."""
    if len(remembered) >= _WORDS_REMEMBERED:
        remembered.clear()
        tokenizer.cache.clear()
    letters = "".join(tokenizer.byte_encoder[byte] for byte in word.encode())
    found = [tokenizer.encoder[piece] for piece in tokenizer.bpe(letters).split(" ")]
    remembered[word] = found
    return found


def trim_padding(token_ids: Int64[Tensor, "batch token"]) -> Int64[Tensor, "batch longest"]:
    """Cut columns that are padding (0) in every row.

    Exact for causal text towers that read out the end mark: later positions cannot be seen.
    """
    longest = int((token_ids != 0).sum(dim=1).max()) if len(token_ids) else 0
    return token_ids[:, : max(longest, 1)]
