"""The model under evaluation, as functions: whatever embeds images and captions can be judged."""

import hashlib
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import torch
from jaxtyping import Float

from vlm.errors import BundleError, VlmError
from vlm.inference import Bundle, Captioner, Encoder, ModalityMeans
from vlm.models import CoCa
from vlm.preprocess import decode_image, decode_picture

__all__ = ["Subject", "subject_of_bundle", "subject_of_encoder", "subject_of_open_clip"]

_HUB_SECONDS: Final = 3.0
Rows = Float[np.ndarray, "batch dim"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A dual encoder, of whatever origin."""

    name: str
    fingerprint: str
    """Tells embeddings of different weights apart; empty where there is none."""
    dim: int
    logit_scale: float
    decode: Callable[[bytes], Any]
    """From an image file to what `encode_images` takes. Raises `DataError`."""
    encode_images: Callable[[Sequence[Any]], Rows]
    """To float32 unit rows."""
    encode_texts: Callable[[Sequence[str]], Rows]
    caption: Callable[[Sequence[Any]], list[str]] | None = None
    """Of a model that also writes captions."""
    means: ModalityMeans | None = None
    """Of a reference set, for centring."""


def subject_of_bundle(bundle: Bundle, *, device: str = "cpu") -> Subject:
    """The model of a bundle on a device."""
    captioner = Captioner(bundle, device=device) if isinstance(bundle.model, CoCa) else None
    return subject_of_encoder(Encoder(bundle, device=device), captioner)


def subject_of_encoder(encoder: Encoder, captioner: Captioner | None = None) -> Subject:
    """An encoder, and what writes captions with the same weights."""
    info, side = encoder.info, encoder.info.image.decode_side()
    return Subject(
        name=info.name,
        fingerprint=info.fingerprint,
        dim=info.dim,
        logit_scale=info.logit_scale,
        decode=lambda data: decode_image(data, min_side=side),
        encode_images=encoder.encode_images,
        encode_texts=encoder.encode_texts,
        caption=captioner.caption if captioner else None,
        means=info.modality_means,
    )


def subject_of_open_clip(name: str, *, device: str = "cpu") -> Subject:
    """A model of open_clip with its own preprocessing and tokenizer.

    Args:
        name: `local-dir:FOLDER`, `hf-hub:OWNER/NAME`, or `ARCHITECTURE/TAG` as in
            `open_clip.list_pretrained()`.
        device: Where to compute.

    Raises:
        VlmError: If there is no such model, or it cannot be fetched from the hub.
    """
    import open_clip  # noqa: PLC0415 - seconds, only its own models pay

    architecture, tag = name, None
    if not name.startswith(("local-dir:", "hf-hub:")):
        architecture, _, tag = name.partition("/")
    try:
        with _no_vain_retries() if not name.startswith("local-dir:") else nullcontext():
            model, _, transform = open_clip.create_model_and_transforms(
                architecture, pretrained=tag, device=device
            )
            tokenizer = open_clip.get_tokenizer(architecture)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _unavailable(name, error) from error
    model.eval()

    @torch.inference_mode()
    def encode_images(pictures: Sequence[Any]) -> Rows:
        pixels = torch.stack([transform(picture) for picture in pictures]).to(device)
        return model.encode_image(pixels, normalize=True).float().cpu().numpy()

    @torch.inference_mode()
    def encode_texts(texts: Sequence[str]) -> Rows:
        ids = tokenizer(list(texts)).to(device)
        return model.encode_text(ids, normalize=True).float().cpu().numpy()

    return Subject(
        name=name,
        fingerprint=_fingerprint(model),
        dim=encode_texts(["a"]).shape[1],
        logit_scale=float(model.logit_scale.exp().item()),
        decode=decode_picture,
        encode_images=encode_images,
        encode_texts=encode_texts,
    )


@contextmanager
def _no_vain_retries() -> Iterator[None]:
    """Where the model hub cannot be reached, look into its client's cache alone.

    The client asks an unreachable hub again for about a minute. Behind a proxy nothing is tried.
    """
    from huggingface_hub import constants  # noqa: PLC0415 - only models of the hub need it

    known, host = constants.HF_HUB_OFFLINE, urlsplit(constants.ENDPOINT)
    if not known and not getproxies():
        port = host.port or (80 if host.scheme == "http" else 443)
        try:
            socket.create_connection((host.hostname or "", port), timeout=_HUB_SECONDS).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = known


def _unavailable(name: str, error: Exception) -> VlmError:
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        why = "it has no open_clip_config.json" if folder.is_dir() else "there is no such folder"
        detail = why if not (folder / "open_clip_config.json").is_file() else str(error)
        return BundleError(f"{name}: not a model of open_clip: {detail}")
    reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
    message = (
        f"{name}: open_clip cannot make this model ({type(error).__name__}: {reason}). Known "
        f"names are those of open_clip.list_pretrained(), written ARCHITECTURE/TAG; their weights "
        f"come from the model hub, so a machine without access needs a copy: local-dir:FOLDER"
    )
    return VlmError(message)


def _fingerprint(model: Any) -> str:

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if tensor.dim()
            else str(tensor.item()).encode()
        )
    return digest.hexdigest()
