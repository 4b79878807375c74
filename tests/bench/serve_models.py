"""The ViT-B/32 that `bench_serve` serves: as our bundle, and as a folder of transformers.

Nothing was trained. The towers are random; their two last projections are fitted by least squares,
so that each of the drawn pairs of the parity gate has a direction of its own, as a trained model
would give it. Without that the best text of an image wins by a hair, and the gate judges chance.
The time that a batch takes does not depend on the weights.
"""

import gzip
import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm.inference import load_bundle, save_bundle
from vlm.inference.runtimes import drawn_calibration
from vlm.models import DualEncoder, DualEncoderConfig
from vlm.preprocess import ImageConfig, TokenizerConfig, normalise_images

__all__ = ["save_fitted", "save_transformers"]

B32: Final = {
    "dim": 512,
    "image": {"type": "vit", "width": 768, "layers": 12, "head_width": 64, "patch_size": 32},
    "text": {"type": "transformer", "width": 512, "layers": 12, "heads": 8},
}
_RIDGE: Final = 1e-3
_BATCH: Final = 16
_BLOCK: Final = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_PLAIN: Final = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.ln_final.weight": "text_model.final_layer_norm.weight",
    "text.ln_final.bias": "text_model.final_layer_norm.bias",
}


def save_fitted(folder: Path) -> None:
    """Write the bundle."""
    torch.manual_seed(0)
    config = DualEncoderConfig.model_validate(B32)
    open_clip_config = config.open_clip_config(image_size=224, context_length=77)
    model = DualEncoder(open_clip_config).eval()
    image, tokenizer = ImageConfig(), TokenizerConfig()
    towers: Any = model  # torch types what a module holds as Tensor | Module
    pairs = drawn_calibration(image)
    targets = torch.linalg.qr(torch.randn(512, len(pairs.texts)))[0].T  # [pair dim]
    with torch.no_grad():
        for projection, rows in (
            (towers.image.proj, _image_rows(towers, pairs.pixel_batches(batch=_BATCH), image)),
            (
                towers.text.text_projection,
                _text_rows(towers, pairs.token_ids(tokenizer, batch=_BATCH)),
            ),
        ):
            projection.copy_(_fitted(rows, targets))
    save_bundle(
        folder, model, name="b32", open_clip_config=open_clip_config, image=image,
        tokenizer=tokenizer,
    )  # fmt: skip


def _image_rows(model: Any, batches: list[Any], config: ImageConfig) -> Tensor:
    """What the image projection reads; [pair width]."""
    model.image.proj.copy_(torch.eye(768)[:, :512])
    seen: list[Tensor] = []
    hook = model.image.ln_post.register_forward_hook(lambda _m, _i, out: seen.append(out))
    for batch in batches:
        model.encode_image(normalise_images(torch.from_numpy(batch), config))
    hook.remove()
    return torch.cat([out[:, 0] if out.ndim == 3 else out for out in seen])


def _text_rows(model: Any, batches: list[Any]) -> Tensor:
    """What the text projection reads: the state at each text's end; [pair width]."""
    seen: list[Tensor] = []
    hook = model.text.ln_final.register_forward_hook(lambda _m, _i, out: seen.append(out))
    ends = []
    for batch in batches:
        ids = torch.from_numpy(batch)
        model.encode_text(ids)
        ends.append(ids.argmax(dim=1))
    hook.remove()
    # The tower may pick the state before it normalises it, or after.
    return torch.cat(
        [
            out[torch.arange(len(end)), end] if out.ndim == 3 else out
            for out, end in zip(seen, ends, strict=True)
        ]
    )


def _fitted(rows: Tensor, targets: Tensor) -> Tensor:
    """The projection that leads each row to its target, by ridge regression in fp64."""
    x = rows.double()
    gram = x.T @ x
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, x.T @ targets.double()).float()


def save_transformers(bundle: Path, folder: Path) -> None:
    """Write the bundle's model as a folder that `transformers.CLIPModel` opens."""
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = load_bundle(bundle).model
    weights = model.open_clip_state()
    save_file(renamed(weights), folder / "model.safetensors", metadata={"format": "pt"})
    shared = {"intermediate_size": 3072, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
    config = {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 512,
        "logit_scale_init_value": float(weights["logit_scale"]),
        "vision_config": {
            "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "patch_size": 32, "image_size": 224, **shared,
        },
        "text_config": {
            "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
            "vocab_size": 49408, "max_position_embeddings": 77, **shared,
            "intermediate_size": 2048, "eos_token_id": 49407, "bos_token_id": 49406,
        },
    }  # fmt: skip
    image = ImageConfig()
    processor = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224}, "resample": 3, "do_convert_rgb": True,
        "image_mean": list(image.mean), "image_std": list(image.std),
    }  # fmt: skip
    vocabulary, merges = _byte_pairs(bundle)
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
               "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}  # fmt: skip
    words = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    files = {
        "config.json": config, "preprocessor_config.json": processor, "vocab.json": vocabulary,
        "tokenizer_config.json": words, "special_tokens_map.json": special,
    }  # fmt: skip
    for name, tree in files.items():
        (folder / name).write_text(json.dumps(tree), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of open_clip's ViT and text transformer under transformers' names."""
    found: dict[str, Tensor] = {"logit_scale": weights["logit_scale"].reshape(())}
    for name, tensor in weights.items():
        if name in _PLAIN:
            found[_PLAIN[name]] = tensor
        elif name == "visual.proj":
            found["visual_projection.weight"] = tensor.T
        elif name == "text.text_projection":
            found["text_projection.weight"] = tensor.T
        elif ".resblocks." in name:
            found.update(_block(name, tensor))
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _block(name: str, tensor: Tensor) -> dict[str, Tensor]:
    tower = "vision_model" if name.startswith("visual.") else "text_model"
    number, _, part = name.split(".resblocks.")[1].partition(".")
    start = f"{tower}.encoder.layers.{number}"
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{start}.self_attn.{letter}_proj.{kind}": rows for letter, rows in parts}
    module, _, kind = part.rpartition(".")
    return {f"{start}.{_BLOCK[module]}.{kind}": tensor}


def _byte_pairs(bundle: Path) -> tuple[dict[str, int], list[str]]:
    """CLIP's vocabulary and merges, in the order of open_clip's own tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer

    path = bundle / "bpe_simple_vocab_16e6.txt.gz"
    tokenizer = SimpleTokenizer(bpe_path=str(path))
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {ends.get(token, token): number for token, number in tokenizer.encoder.items()}
    return vocabulary, lines[1 : 49152 - 256 - 2 + 1]
