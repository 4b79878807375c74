"""From captions to token ids."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Int64
from pydantic import Field, Tag
from torch import Tensor

from vlm.config import Config, type_or
from vlm.preprocess.byte_pairs import merged_pieces
from vlm.preprocess.huggingface_tokens import (
    TOKENIZER_FILES,
    HuggingFaceTokenizerConfig,
    build_huggingface_tokenizer,
    open_huggingface_tokenizer,
)
from vlm.types import Tokenize

__all__ = [
    "AnyTokenizerConfig",
    "TokenizerConfig",
    "build_detokenizer",
    "build_tokenizer",
    "save_tokenizer",
    "tokenizer_digest",
    "tokenizer_files",
    "tokenizer_vocab_size",
    "trim_padding",
]

_MERGES: Final = "bpe_simple_vocab_16e6.txt.gz"

_WORDS_REMEMBERED: Final = 65_536
_LONGEST_REMEMBERED: Final = 64


class TokenizerConfig(Config):
    """open_clip's byte-pair tokenizer, which needs no download."""

    type: Literal["simple"] = "simple"
    context_length: int = Field(77, ge=4)
    """Positions of a tokenized caption, start and end marks included."""


AnyTokenizerConfig = Annotated[
    Annotated[TokenizerConfig, Tag("simple")]
    | Annotated[HuggingFaceTokenizerConfig, Tag("huggingface")],
    type_or("simple"),
]


def build_tokenizer(config: TokenizerConfig | HuggingFaceTokenizerConfig) -> Tokenize:
    """The function from captions to padded token ids; long captions are cut, keeping the end mark.

    The ids are those of open_clip's tokenizers. Deterministic, and safe to call from threads.

    Raises:
        ConfigError: If a tokenizer of transformers cannot be opened.
    """
    if isinstance(config, HuggingFaceTokenizerConfig):
        return build_huggingface_tokenizer(config)
    tokenizer = _simple(config)
    # open_clip keeps the marks, which are no words, where it keeps the words that it has seen.
    marks = {mark: [tokenizer.encoder[mark]] for mark in tokenizer.cache}
    return partial(_tokenize, tokenizer, marks, {}, config.context_length)


def build_detokenizer(
    config: TokenizerConfig | HuggingFaceTokenizerConfig,
) -> Callable[[list[int]], str]:
    """The function from token ids to text, up to the end mark if there is one; lower case.

    Raises:
        ValueError: If the tokenizer is not the byte-pair one, which alone writes captions.
    """
    if not isinstance(config, TokenizerConfig):
        message = f"captions are written with the tokenizer simple, not {config.type}"
        raise ValueError(message)
    return partial(_detokenize, _simple(config))


def tokenizer_files(config: TokenizerConfig | HuggingFaceTokenizerConfig) -> tuple[str, ...]:
    """Names of the files that `save_tokenizer` writes and that decide the ids."""
    return (_MERGES,) if isinstance(config, TokenizerConfig) else TOKENIZER_FILES


def save_tokenizer(
    config: TokenizerConfig | HuggingFaceTokenizerConfig, folder: Path
) -> TokenizerConfig | HuggingFaceTokenizerConfig:
    """Write all that the tokenizer consists of into `folder`.

    Returns:
        The configuration of the tokenizer that lies there, whose source is `.`.
    """
    if isinstance(config, HuggingFaceTokenizerConfig):
        open_huggingface_tokenizer(config.source).save_pretrained(folder)
        return config.model_copy(update={"source": "."})
    from open_clip.tokenizer import default_bpe  # noqa: PLC0415 - seconds, and data verbs skip it

    shutil.copyfile(default_bpe(), folder / _MERGES)
    return config


def tokenizer_vocab_size(config: TokenizerConfig | HuggingFaceTokenizerConfig) -> int:
    """How many ids there are, marks included."""
    if isinstance(config, HuggingFaceTokenizerConfig):
        return len(open_huggingface_tokenizer(config.source))
    return int(_simple(config).vocab_size)


def tokenizer_digest(config: TokenizerConfig | HuggingFaceTokenizerConfig) -> str:
    """Equal for tokenizers that give equal ids, wherever they lie and however long captions are."""
    if isinstance(config, TokenizerConfig):
        return config.type
    inner = open_huggingface_tokenizer(config.source).backend_tokenizer
    inner.no_truncation()
    inner.no_padding()
    content = hashlib.sha256(inner.to_str().encode()).hexdigest()
    return f"{config.type} {config.clean} {content}"


def _simple(config: TokenizerConfig) -> Any:
    from open_clip.tokenizer import SimpleTokenizer  # noqa: PLC0415 - seconds, and data verbs skip it

    return SimpleTokenizer(context_length=config.context_length)


def _tokenize(
    tokenizer: Any,
    marks: Mapping[str, list[int]],
    remembered: dict[str, list[int]],
    context_length: int,
    captions: list[str],
) -> Int64[Tensor, "batch token"]:
    ids = np.zeros((len(captions), context_length), dtype=np.int64)
    for row, caption in zip(ids, captions, strict=True):
        words = tokenizer.pat.findall(_cleaned(caption, tokenizer.clean_fn))
        tokens = [tokenizer.sot_token_id]
        for word in words:
            if len(tokens) >= context_length:
                break  # what follows is cut
            known = marks.get(word) or remembered.get(word)
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
    letters = [tokenizer.byte_encoder[byte] for byte in word.encode()]
    found = [tokenizer.encoder[piece] for piece in merged_pieces(tokenizer.bpe_ranks, letters)]
    if len(word) > _LONGEST_REMEMBERED:
        return found
    if len(remembered) >= _WORDS_REMEMBERED:
        remembered.clear()
    remembered[word] = found
    return found


def trim_padding(token_ids: Int64[Tensor, "batch token"]) -> Int64[Tensor, "batch longest"]:
    """Cut the columns at the end that are 0 in every row.

    0 is the padding of the byte-pair tokenizer and of BERT's. It may be a token too, `!` of the
    former, but a row never ends with it. Rows of tokenizers that pad with another id stay whole.
    """
    filled = (token_ids != 0).any(dim=0).nonzero()
    longest = int(filled[-1]) + 1 if len(filled) else 0
    return token_ids[:, : max(longest, 1)]
