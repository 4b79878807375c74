"""Classes as requests bring them: by words, by example images, or by both."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Final, Literal

from PIL import Image

from serving.errors import BadInputError
from serving.routes.bodies import where_it_pays
from serving.routes.state import Services, refuse_more_than
from serving.schemas import ClassIn
from serving.services.label_sets import LabelClass, LabelSet
from vlm.errors import DataError
from vlm.inference import expanded_templates
from vlm.preprocess import decode_image

__all__ = ["label_set_of", "with_kept_images"]

_EXAMPLE_SIDE: Final = 512
"""The shorter one: models scale that one to their input's side and crop the rest."""
_EXAMPLE_PIXELS: Final = 4_000_000
_WEBP_SIDE: Final = 16_383
"""The format holds no more."""


async def label_set_of(
    classes: Sequence[str | ClassIn],
    templates: Sequence[str],
    mode: Literal["exclusive", "independent"],
    services: Services,
) -> LabelSet:
    """What a request means by its classes; the example files stay as they came.

    Raises:
        BadInputError: If the settings do not allow so many prompts or images, or so long a text.
    """
    whole = [ClassIn(label=c) if isinstance(c, str) else c for c in classes]
    _refuse_too_much(whole, templates, services)
    size = sum(len(image) for c in whole for image in c.images)
    return await where_it_pays(size, _label_set, whole, templates, mode)


def _label_set(
    classes: Sequence[ClassIn],
    templates: Sequence[str],
    mode: Literal["exclusive", "independent"],
) -> LabelSet:
    return LabelSet(
        classes=[
            LabelClass(
                label=c.label,
                prompts=c.prompts,
                images=[base64.b64encode(image).decode() for image in c.images],
                image_weight=c.image_weight,
            )
            for c in classes
        ],
        templates=list(templates),
        mode=mode,
    )


async def with_kept_images(label_set: LabelSet, services: Services) -> LabelSet:
    """The set as it is stored: examples small, upright, without metadata or further loss.

    They are decoded where all images are, a few at a time; if the request is given up, or one of
    them cannot be kept, those that were not begun never are.

    Raises:
        BadInputError: If one is no image; the message names the class.
    """
    most = services.settings.max_image_pixels
    kept = iter(
        await services.registry.workers.decoding.run_each(
            _kept,
            [
                (f"classes.{c.label[:64]}.images.{number}", image, most)
                for c in label_set.classes
                for number, image in enumerate(c.images)
            ],
        )
    )
    classes = [
        c.model_copy(update={"images": [next(kept) for _ in c.images]}) for c in label_set.classes
    ]
    return label_set.model_copy(update={"classes": classes})


def _refuse_too_much(
    classes: Sequence[ClassIn], templates: Sequence[str], services: Services
) -> None:
    settings = services.settings
    prompts = sum(len(c.prompts or expanded_templates(templates)) for c in classes)
    refuse_more_than(settings.max_labels, prompts, "prompts")
    refuse_more_than(settings.max_images, sum(len(c.images) for c in classes), "images")
    texts = [*templates, *(t for c in classes for t in [c.label, *(c.prompts or [])])]
    longest = max(map(len, texts))
    refuse_more_than(settings.max_text_characters, longest, "characters of a label or template")


def _kept(field: str, data: str, max_pixels: int) -> str:
    """One example in base64."""
    try:
        pixels = decode_image(base64.b64decode(data), max_pixels=max_pixels)
    except DataError as error:
        message = f"{field}: {error}"
        raise BadInputError(message) from error
    image = Image.fromarray(pixels)
    size = _example_size(*image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    buffer = io.BytesIO()
    if max(size) <= _WEBP_SIDE:
        image.save(buffer, "WEBP", lossless=True)
    else:
        image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _example_size(width: int, height: int) -> tuple[int, int]:
    """At most 512 pixels on the shorter side; fewer only where 4 million in all ask for it."""
    scale = min(
        1.0, _EXAMPLE_SIDE / min(width, height), math.sqrt(_EXAMPLE_PIXELS / (width * height))
    )
    shorter = max(1, round(scale * min(width, height)))
    longer = min(round(scale * max(width, height)), _EXAMPLE_PIXELS // shorter)
    return (shorter, longer) if width < height else (longer, shorter)
