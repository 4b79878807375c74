"""Tokenizers of the transformers library, from a folder or the model hub."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.errors import ConfigError
from vlm.types import Tokenize

__all__ = [
    "TOKENIZER_FILES",
    "HuggingFaceTokenizerConfig",
    "build_huggingface_tokenizer",
    "open_huggingface_tokenizer",
]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""What such a tokenizer is saved as, all that it needs to be opened again."""


class HuggingFaceTokenizerConfig(Config):
    """A tokenizer of transformers, as BERT's or SigLIP's; needs the extra `huggingface`.

    Ids, marks and cuts are the tokenizer's own: [CLS] and [SEP] of BERT are there also when a
    caption is cut. Rows are padded on the right, with the id that the tokenizer pads with.
    """

    type: Literal["huggingface"] = "huggingface"
    source: str
    """A folder with the tokenizer's files, or a name on the model hub."""
    context_length: int = Field(64, ge=4)
    """Positions of a tokenized caption, marks included."""
    clean: Literal["whitespace", "lower", "canonicalize"] = "whitespace"
    """As in open_clip, done before; SigLIP's tokenizer needs `canonicalize`."""


def open_huggingface_tokenizer(source: str) -> Any:
    """The tokenizer of transformers.

    Raises:
        ConfigError: If the extra is not installed, or there is no tokenizer that pads.
    """
    try:
        from transformers import AutoTokenizer  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        message = "tokenizer.type=huggingface needs transformers: pip install 'vlm[huggingface]'"
        raise ConfigError(message) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        where = "in this folder" if Path(source).is_dir() else "here, nor on a hub that answers"
        message = f"tokenizer.source={source}: no tokenizer {where} ({_first_line(error)})"
        raise ConfigError(message) from error
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        lack = "padding token" if tokenizer.is_fast else "fast implementation"
        message = f"tokenizer.source={source}: this tokenizer has no {lack}; choose another"
        raise ConfigError(message)
    return tokenizer


def build_huggingface_tokenizer(config: HuggingFaceTokenizerConfig) -> Tokenize:
    """The function from captions to padded ids; safe to call from threads."""
    from open_clip.tokenizer import get_clean_fn  # noqa: PLC0415 - seconds, and data verbs skip it

    tokenizer = open_huggingface_tokenizer(config.source)
    # The Rust object itself, told once how to cut and pad: transformers' own call tells it anew
    # each time, which fails when two threads do so at once.
    encoder = tokenizer.backend_tokenizer
    encoder.enable_truncation(config.context_length)
    encoder.enable_padding(
        direction="right",
        pad_id=tokenizer.pad_token_id,
        pad_token=tokenizer.pad_token,
        length=config.context_length,
    )
    return partial(_tokenize, encoder, get_clean_fn(config.clean), config.context_length)


def _tokenize(
    encoder: Any, clean: Any, context_length: int, captions: list[str]
) -> Int64[Tensor, "batch token"]:
    # One by one: encode_batch starts threads of its own, beside those of the data plane.
    ids = [encoder.encode(clean(caption)).ids for caption in captions]
    return torch.tensor(ids, dtype=torch.int64).reshape(len(captions), context_length)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
