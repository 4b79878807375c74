"""Models of open_clip become bundles that give open_clip's own embeddings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.support import drawing
from vlm.cli.serve import bundle_folder
from vlm.errors import BundleError
from vlm.inference import Encoder
from vlm.inference.open_clip_source import import_open_clip

MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}


def open_clip_folder(folder: Path, model: dict[str, Any] = MODEL) -> Any:
    """A folder as open_clip writes it, with weights in the naming of its plain CLIP."""
    from open_clip.model import CLIP

    folder.mkdir(parents=True, exist_ok=True)
    clip = CLIP(**MODEL).eval()
    save_file(
        {k: v.contiguous() for k, v in clip.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    tree = {"model_cfg": model, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(tree))
    return clip


def test_a_folder_of_open_clip_gives_its_embeddings_scale_and_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    source = tmp_path / "theirs"
    open_clip_folder(source)
    monkeypatch.chdir(tmp_path)
    folder = bundle_folder(f"local-dir:{source}", tmp_path / "cache")
    assert folder == Path("runs/theirs/bundle")
    encoder = Encoder.load(folder)
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{source}")
    tokens = open_clip.get_tokenizer(f"local-dir:{source}")(["a red circle", "blue"])
    with torch.inference_mode():
        texts = theirs.eval().encode_text(tokens, normalize=True)
        images = theirs.encode_image(transform(drawing("red", "circle"))[None], normalize=True)
    np.testing.assert_allclose(encoder.encode_texts(["a red circle", "blue"]), texts, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_images([drawing("red", "circle")]), images, atol=1e-5)
    assert encoder.info.logit_scale == pytest.approx(float(theirs.logit_scale.detach().exp()))
    assert encoder.info.image.interpolation == "bilinear"
    assert str(tmp_path) not in encoder.info.model_dump_json()


def test_a_bundle_is_made_once_and_again_when_the_folder_changes(tmp_path: Path) -> None:
    open_clip_folder(tmp_path / "m")
    source, folder = f"local-dir:{tmp_path / 'm'}", tmp_path / "bundle"
    first = import_open_clip(source, folder)
    written = (folder / "bundle.json").stat().st_mtime_ns
    assert import_open_clip(source, folder) == first
    assert (folder / "bundle.json").stat().st_mtime_ns == written
    (folder / "bundle.json").write_text('{"format_version": 1}')  # of an older program
    assert import_open_clip(source, folder) == first
    open_clip_folder(tmp_path / "m")
    assert import_open_clip(source, folder).fingerprint != first.fingerprint


def test_what_cannot_become_a_bundle_is_told_with_the_way_out(tmp_path: Path) -> None:
    def refusal(source: str) -> str:
        with pytest.raises(BundleError) as caught:
            import_open_clip(source, tmp_path / "bundle")
        return str(caught.value)

    assert "cannot be read" in refusal(f"local-dir:{tmp_path / 'absent'}")
    folder = tmp_path / "pickled"
    open_clip_folder(folder)
    (folder / "open_clip_model.safetensors").rename(folder / "open_clip_pytorch_model.bin")
    assert "would be unpickled" in refusal(f"local-dir:{folder}")
    text = {**MODEL["text_cfg"], "hf_tokenizer_name": "x"}
    open_clip_folder(tmp_path / "hf", {**MODEL, "text_cfg": text})
    assert "text_cfg.hf_tokenizer_name" in refusal(f"local-dir:{tmp_path / 'hf'}")
    open_clip_folder(tmp_path / "wide", {**MODEL, "embed_dim": 8})
    assert "do not make a model" in refusal(f"local-dir:{tmp_path / 'wide'}")
    (tmp_path / "hf/open_clip_config.json").write_text("{")
    assert "open_clip_config.json cannot be read" in refusal(f"local-dir:{tmp_path / 'hf'}")
    (tmp_path / "hf/open_clip_config.json").write_text("{}")
    assert "cannot be read ('model_cfg')" in refusal(f"local-dir:{tmp_path / 'hf'}")
    assert not (tmp_path / "bundle").exists()


def test_the_hub_is_named_when_it_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(known: dict[str, Any]) -> str:
        message = "Name or service not known\nand more"
        raise OSError(message)

    monkeypatch.setattr("open_clip.download_pretrained", no_network)
    with pytest.raises(
        BundleError, match=r"model hub that answers \(Name or service not known\); d"
    ):
        import_open_clip("open_clip:ViT-B-32/laion2b_s34b_b79k", tmp_path / "b")
    with pytest.raises(BundleError, match="no checkpoint 'nothing' of it; there are: openai"):
        import_open_clip("open_clip:ViT-B-32/nothing", tmp_path / "b")
    with pytest.raises(BundleError, match="no weights here; name a checkpoint"):
        import_open_clip("open_clip:ViT-B-32", tmp_path / "b")
