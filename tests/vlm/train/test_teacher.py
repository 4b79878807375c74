"""A frozen teacher: what it sees, what it is refused for, and that nothing changes it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.support import drawing, tiny_bundle
from vlm.errors import ConfigError
from vlm.inference import Encoder
from vlm.preprocess import ImageConfig, TokenizerConfig, build_tokenizer, trim_padding
from vlm.train.config import TeacherConfig
from vlm.train.teacher import Teacher, load_teacher

CAPTIONS = ["a red circle", "a blue square of many colours and of many more words than fit"]


def teacher(folder: Path, **changes: Any) -> Teacher:
    settings: dict[str, Any] = {
        "image": ImageConfig(size=32), "tokenizer": TokenizerConfig(context_length=12), **changes,
    }  # fmt: skip
    config = TeacherConfig(bundle=folder, precision="fp32")
    return load_teacher(config, device=torch.device("cpu"), **settings)


def pixels(size: int = 32) -> torch.Tensor:
    images = [np.asarray(drawing(c, "circle", size=size)) for c in ("red", "blue")]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


def test_the_teacher_embeds_as_its_bundle_does_when_served(tmp_path: Path) -> None:
    info = tiny_bundle(tmp_path / "b")
    encoder = Encoder.load(tmp_path / "b")
    ids = build_tokenizer(TokenizerConfig(context_length=12))(CAPTIONS)
    given = teacher(tmp_path / "b")
    found = given.embed(pixels(), ids)
    assert given.fingerprint == info.fingerprint
    images = [drawing(c, "circle") for c in ("red", "blue")]
    assert_close(found.image.numpy(), encoder.encode_images(images), atol=1e-5, rtol=1e-5)
    assert_close(found.text.numpy(), encoder.encode_texts(CAPTIONS), atol=1e-5, rtol=1e-5)
    assert not found.image.requires_grad
    assert not found.text.requires_grad
    assert not found.logit_scale.requires_grad


@pytest.mark.parametrize("length", [6, 10, 12, 30])
def test_a_caption_of_another_context_is_cut_as_the_teacher_would(
    tmp_path: Path, length: int
) -> None:
    tiny_bundle(tmp_path / "b")
    ids = build_tokenizer(TokenizerConfig(context_length=length))(CAPTIONS)
    config = TokenizerConfig(context_length=length)
    given = teacher(tmp_path / "b", tokenizer=config)
    found = given.embed(pixels(), trim_padding(ids)).text
    # What the teacher would see of the caption that the student sees.
    own = build_tokenizer(TokenizerConfig(context_length=min(length, 12)))(CAPTIONS)
    expected = teacher(tmp_path / "b").embed(pixels(), own).text
    assert_close(found, expected)


def test_images_of_another_size_are_resized_to_the_teachers(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "b")
    given = teacher(tmp_path / "b", image=ImageConfig(size=64))
    ids = build_tokenizer(TokenizerConfig(context_length=12))(CAPTIONS)
    large = pixels().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    found, plain = given.embed(large, ids).image, given.embed(pixels(), ids).image
    assert float((found * plain).sum(dim=1).min()) > 0.99


def test_no_bundle_or_another_geometry_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="teacher.bundle: .*not a bundle"):
        teacher(tmp_path / "nothing")
    tiny_bundle(tmp_path / "b")
    squashed = ImageConfig(size=32, resize_mode="squash")
    with pytest.raises(ConfigError, match="set image.resize_mode to its"):
        teacher(tmp_path / "b", image=squashed)
