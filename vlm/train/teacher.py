"""A frozen teacher: the bundle whose embeddings some loss terms follow."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.errors import BundleError, ConfigError
from vlm.inference import Bundle, load_bundle
from vlm.preprocess import (
    HuggingFaceTokenizerConfig,
    ImageConfig,
    TokenizerConfig,
    normalise_images,
    tokenizer_digest,
)
from vlm.train.config import TeacherConfig
from vlm.train.engine import computes_bf16
from vlm.types import DualEncoderOutput

__all__ = ["Teacher", "load_teacher"]


class Teacher:
    """The embeddings that a bundle gives to a training batch, without gradient.

    It sees the same augmented view of each image as the student, resized to its own input, and
    the same caption, cut or padded to its own context.

    Args:
        bundle: Of the same tokenizer and resize mode as the run.
        device: Where to compute.
        bf16: Whether the towers compute in bfloat16.
    """

    def __init__(self, bundle: Bundle, *, device: torch.device, bf16: bool) -> None:
        self.fingerprint = bundle.info.fingerprint
        self._image = bundle.info.image
        self._context_length = bundle.info.tokenizer.context_length
        self._model = bundle.model.to(device).requires_grad_(False)
        self._bf16 = bf16

    @torch.no_grad()
    def embed(
        self,
        gray_levels: Float[Tensor, "batch channel height width"],
        token_ids: Int64[Tensor, "batch token"],
    ) -> DualEncoderOutput:
        """Unit float32 rows of a batch.

        Args:
            gray_levels: Augmented square images, 0 to 255, of any size.
            token_ids: Captions, padded with 0.
        """
        size = (self._image.size, self._image.size)
        if gray_levels.shape[2:] != size:
            resized = F.interpolate(
                gray_levels, size, mode=self._image.interpolation, antialias=True
            )
            gray_levels = resized.clamp(0, 255)
        images = normalise_images(gray_levels, self._image)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._bf16):
            output: DualEncoderOutput = self._model(images, _cut(token_ids, self._context_length))
        return output


def load_teacher(
    config: TeacherConfig,
    *,
    image: ImageConfig,
    tokenizer: TokenizerConfig | HuggingFaceTokenizerConfig,
    device: torch.device,
) -> Teacher:
    """Load the bundle, and check that it can read the run's batches.

    Raises:
        ConfigError: If there is no bundle, or it has another tokenizer or resize mode.
    """
    try:
        bundle = load_bundle(config.bundle)
    except BundleError as error:
        message = f"teacher.bundle: {error}"
        raise ConfigError(message) from error
    theirs, ours = (tokenizer_digest(given) for given in (bundle.info.tokenizer, tokenizer))
    if theirs != ours:
        message = (
            f"teacher.bundle={config.bundle}: its tokenizer is {theirs}, the run's is {ours}, and "
            f"a batch holds token ids alone; set `tokenizer` to the teacher's, or take another one"
        )
        raise ConfigError(message)
    if bundle.info.image.resize_mode != image.resize_mode:
        message = (
            f"teacher.bundle={config.bundle}: it reads images by "
            f"resize_mode={bundle.info.image.resize_mode}, the run by {image.resize_mode}, and "
            f"what one of them cuts off is lost to the other; set image.resize_mode to its"
        )
        raise ConfigError(message)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and computes_bf16(device))
    return Teacher(bundle, device=device, bf16=bf16)


def _cut(
    token_ids: Int64[Tensor, "batch token"], context_length: int
) -> Int64[Tensor, "batch shorter"]:
    """At most so many positions; a caption that is longer keeps its end mark, its last id."""
    cut = token_ids[:, :context_length].clone()
    if cut.shape[1] < token_ids.shape[1]:
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        ends = ((token_ids != 0) * positions).amax(dim=1, keepdim=True)
        longer = ends[:, 0] >= context_length
        cut[longer, context_length - 1] = token_ids.gather(1, ends)[longer, 0]
    return cut
