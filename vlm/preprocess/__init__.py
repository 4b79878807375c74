"""Pixels and tokens: the one module that training and serving share.

Both see the same input because both call it.

Images: bytes -> `decode_image` (RGB, safe limits) -> `resize_image` (uint8, square) ->
`normalise_images` (float). Text: `build_tokenizer`. `resize_image` gives the pixels of open_clip's
evaluation transform to within one gray level, which the tests hold.
"""

from vlm.preprocess.huggingface_tokens import HuggingFaceTokenizerConfig
from vlm.preprocess.images import (
    DEFAULT_MAX_PIXELS,
    ImageConfig,
    Pixels,
    decode_image,
    decode_picture,
    flatten_image,
    normalise_images,
    prepare_image,
    resize_image,
    stack_images,
)
from vlm.preprocess.reencode import reencode_image
from vlm.preprocess.tokens import (
    AnyTokenizerConfig,
    TokenizerConfig,
    build_detokenizer,
    build_tokenizer,
    save_tokenizer,
    tokenizer_digest,
    tokenizer_files,
    tokenizer_vocab_size,
    trim_padding,
)

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "AnyTokenizerConfig",
    "HuggingFaceTokenizerConfig",
    "ImageConfig",
    "Pixels",
    "TokenizerConfig",
    "build_detokenizer",
    "build_tokenizer",
    "decode_image",
    "decode_picture",
    "flatten_image",
    "normalise_images",
    "prepare_image",
    "reencode_image",
    "resize_image",
    "save_tokenizer",
    "stack_images",
    "tokenizer_digest",
    "tokenizer_files",
    "tokenizer_vocab_size",
    "trim_padding",
]
