import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support import TINY_MODEL, describe, drawing, tiny_bundle
from vlm.errors import BundleError
from vlm.inference import Encoder, load_bundle, read_bundle_info, save_bundle
from vlm.models import DualEncoder, DualEncoderConfig, clamp_logit_scale
from vlm.preprocess import ImageConfig, TokenizerConfig, build_tokenizer, trim_padding

TEXTS = ["a red circle", "blue", "a yellow square on a black ground with many more words"]
TOWERS = [
    TINY_MODEL["image"],
    {"type": "resnet", "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    {"type": "timm", "name": "test_resnet"},
]


def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (40, 70, 3), dtype=np.uint8))
    return [drawing("red", "circle", size=48), drawing("blue", "square"), noise]


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: str(tower["type"]))
def test_plain_open_clip_opens_the_bundle_and_embeds_alike(
    tmp_path: Path, tower: dict[str, object]
) -> None:
    config = DualEncoderConfig.model_validate({**TINY_MODEL, "image": tower})
    open_clip_config = config.open_clip_config(image_size=32, context_length=12)
    save_bundle(
        tmp_path / "b", DualEncoder(open_clip_config), name="x", open_clip_config=open_clip_config,
        image=ImageConfig(size=32), tokenizer=TokenizerConfig(context_length=12),
    )  # fmt: skip
    ours = Encoder.load(tmp_path / "b")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'b'}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'b'}")
    with torch.no_grad():
        model.eval()
        pixels = torch.stack([transform(image) for image in images()])
        image_rows = model.encode_image(pixels, normalize=True).numpy()
        text_rows = model.encode_text(tokenize(TEXTS), normalize=True).numpy()
    # Resized pixels may differ by one gray level.
    np.testing.assert_allclose(ours.encode_images(images()), image_rows, atol=1e-3)
    np.testing.assert_allclose(ours.encode_texts(TEXTS), text_rows, atol=1e-5)
    assert float(model.logit_scale.detach().exp()) == pytest.approx(ours.info.logit_scale, rel=1e-6)


def test_the_bundle_opens_where_vlm_is_not_installed(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "b")
    expected = Encoder.load(tmp_path / "b").encode_texts(TEXTS)
    # A torchvision that needs the import hook gets it from a copy of that one file.
    shim = Path(__file__).parents[3] / "vlm" / "torchvision_shim.py"
    code = (
        "import runpy, sys, json\n"
        "sys.modules['vlm'] = None\n"
        f"runpy.run_path({str(shim)!r})['install']()\n"
        "import open_clip, torch\n"
        f"name = 'local-dir:{tmp_path / 'b'}'\n"
        "model, _, _ = open_clip.create_model_and_transforms(name)\n"
        f"ids = open_clip.get_tokenizer(name)({TEXTS!r})\n"
        "print(json.dumps(model.eval().encode_text(ids, normalize=True).tolist()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), expected, atol=1e-5)


def test_rows_are_unit_and_do_not_depend_on_their_batch(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "b")
    encoder = Encoder(load_bundle(tmp_path / "b"), batch_size=2)
    together = encoder.encode_images(images())
    alone = np.concatenate([encoder.encode_images([image]) for image in images()])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    texts = np.concatenate([encoder.encode_texts([text]) for text in TEXTS])
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), texts, atol=1e-6)
    assert encoder.encode_images([]).shape == encoder.encode_texts([]).shape == (0, 16)


def test_trimming_padding_changes_no_text_embedding() -> None:
    config = DualEncoderConfig.model_validate(TINY_MODEL)
    model = DualEncoder(config.open_clip_config(image_size=32, context_length=12)).eval()
    ids = build_tokenizer(TokenizerConfig(context_length=12))(TEXTS[:2])
    trimmed = trim_padding(ids)
    assert trimmed.shape[1] < ids.shape[1]
    full = torch.nn.functional.normalize(model.text(ids), dim=1)
    torch.testing.assert_close(model.encode_text(trimmed), full)
    torch.testing.assert_close(model.encode_text(ids), full)


def test_equal_models_have_equal_fingerprints_and_others_do_not(tmp_path: Path) -> None:
    first = tiny_bundle(tmp_path / "a", seed=1).fingerprint
    assert tiny_bundle(tmp_path / "b", seed=1).fingerprint == first
    assert tiny_bundle(tmp_path / "c", seed=2).fingerprint != first


def test_a_logit_bias_travels(tmp_path: Path) -> None:
    assert tiny_bundle(tmp_path / "b", bias=-10.0).logit_bias == -10.0
    model = load_bundle(tmp_path / "b").model
    assert model.logit_bias is not None
    assert model.logit_bias.tolist() == [-10.0]


def test_an_altered_bundle_is_refused(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "b")
    path = tmp_path / "b" / "model.safetensors"
    state = load_file(path)
    state["logit_scale"] += 1
    save_file(state, path)
    with pytest.raises(BundleError, match=r"altered since export. model.safetensors is not what"):
        load_bundle(tmp_path / "b")


ZEROS = [0.0] * 16
DECISIVE: list[tuple[str, object]] = [
    ("image", {"size": 32, "mean": [0.1, 0.2, 0.3]}),
    ("tokenizer", {"type": "simple", "context_length": 8}),
    ("logit_scale", 1.0),
    ("logit_bias", -3.0),
    ("modality_means", {"image": ZEROS, "text": ZEROS, "num_pairs": 1}),
]


@pytest.mark.parametrize(("field", "value"), DECISIVE)
def test_the_fingerprint_covers_what_the_description_decides(
    tmp_path: Path, field: str, value: object
) -> None:
    before = tiny_bundle(tmp_path / "b").fingerprint
    path = tmp_path / "b" / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    for read in (load_bundle, read_bundle_info):
        with pytest.raises(BundleError, match=r"bundle.json: altered since export.* export it ag"):
            read(tmp_path / "b")
    describe(tmp_path / "b", **{field: value})
    assert load_bundle(tmp_path / "b").info.fingerprint != before


def test_what_decides_nothing_may_be_written_into_the_description(tmp_path: Path) -> None:
    before = tiny_bundle(tmp_path / "b").fingerprint
    describe(tmp_path / "b", name="another", metrics={"top1": 0.5}, provenance={"by": "hand"})
    assert load_bundle(tmp_path / "b").info.fingerprint == before


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("logit_scale", float("nan"), "nan"),
        ("logit_bias", float("-inf"), "-inf"),
        ("image", {"size": 32, "std": [0.5, float("inf"), 0.5]}, "inf"),
        ("modality_means", {"image": [float("nan")], "text": [0.0], "num_pairs": 1}, "nan"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(
    tmp_path: Path, field: str, value: object, found: str
) -> None:
    tiny_bundle(tmp_path / "b")
    describe(tmp_path / "b", **{field: value})
    with pytest.raises(BundleError, match=f"bundle.json: {field} holds {found}, only finite"):
        load_bundle(tmp_path / "b")


def test_a_model_that_diverged_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="logit_bias holds nan"):
        tiny_bundle(tmp_path / "b", bias=float("nan"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "open_clip_config.json"])
def test_an_incomplete_bundle_names_what_is_missing(tmp_path: Path, name: str) -> None:
    tiny_bundle(tmp_path / "b")
    (tmp_path / "b" / name).unlink()
    with pytest.raises(BundleError, match=f"incomplete, cannot read {name}"):
        load_bundle(tmp_path / "b")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "not a bundle"),
        ("{", "not valid JSON"),
        ('{"format_version": 99}', "version 99, .* reads 2; export .* again"),
        ('{"format_version": 2, "nmae": 1}', "nmae: no such key; did you mean 'name'"),
    ],
)
def test_a_folder_that_is_no_bundle_is_told(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "bundle.json").write_text(content)
    with pytest.raises(BundleError, match=said):
        read_bundle_info(tmp_path)


def test_a_folder_that_is_not_a_bundle_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        tiny_bundle(tmp_path / "precious")
    assert (tmp_path / "precious" / "file").read_text() == "x"


def test_a_newer_bundle_replaces_an_older_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "b", seed=1)
    info = tiny_bundle(tmp_path / "b", seed=2)
    assert load_bundle(tmp_path / "b").info.fingerprint == info.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm.inference.bundle.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tiny_bundle(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_the_logit_scale_is_clamped_in_forward_and_in_place() -> None:
    config = DualEncoderConfig.model_validate(TINY_MODEL)
    model = DualEncoder(config.open_clip_config(image_size=32, context_length=12))
    with torch.no_grad():
        model.log_logit_scale.fill_(9.0)
    assert float(model.logit_scale().detach()) == pytest.approx(100.0)
    clamp_logit_scale(model)
    assert float(model.log_logit_scale.detach()) == pytest.approx(np.log(100.0))
