"""Classes as requests bring them: by words, by example images, or by both."""

import base64
import io
from collections.abc import Sequence
from typing import Final, Literal

from PIL import Image

from serving.errors import BadInputError
from serving.routes.state import Services, refuse_more_than
from serving.schemas import ClassIn
from serving.services.label_sets import LabelClass, LabelSet
from vlm.errors import DataError
from vlm.inference import expanded_templates
from vlm.preprocess import decode_image

__all__ = ["label_set_of", "with_kept_images"]

_EXAMPLE_SIDE: Final = 512


def label_set_of(
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
    return LabelSet(
        classes=[
            LabelClass(
                label=c.label,
                prompts=c.prompts,
                images=[base64.b64encode(image).decode() for image in c.images],
                image_weight=c.image_weight,
            )
            for c in whole
        ],
        templates=list(templates),
        mode=mode,
    )


def with_kept_images(label_set: LabelSet, services: Services) -> LabelSet:
    """The set as it is stored: examples small, upright, without metadata or further loss.

    Raises:
        BadInputError: If one is no image; the message names the class.
    """
    most = services.settings.max_image_pixels
    classes = [
        c.model_copy(
            update={
                "images": [
                    _kept(f"classes.{c.label[:64]}.images.{number}", image, most)
                    for number, image in enumerate(c.images)
                ]
            }
        )
        for c in label_set.classes
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
    image.thumbnail((_EXAMPLE_SIDE, _EXAMPLE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return base64.b64encode(buffer.getvalue()).decode()
