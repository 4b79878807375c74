"""The wire format: what requests must look like, and what answers do."""

import base64
import binascii
import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from serving.services.fetching import RemoteImage

__all__ = [
    "AddedItems",
    "ClassifyRequest",
    "ClassifyResponse",
    "Health",
    "ImageBytes",
    "ImageSource",
    "ItemIn",
    "ItemOut",
    "ItemsRequest",
    "ModelName",
    "Problem",
    "SearchRequest",
    "SearchResponse",
    "Text",
]

_MAX_METADATA_BYTES = 16_384
_DATA_URL = re.compile(r"^data:image/[\w.+-]+;base64,", re.IGNORECASE)


def _image_source(value: object) -> bytes | RemoteImage:
    """An address as one; see `_image_bytes` for the rest."""
    if isinstance(value, str) and value[:8].lower().startswith(("http://", "https://")):
        return RemoteImage(value)
    return _image_bytes(value)


def _image_bytes(value: object) -> bytes:
    """An uploaded file as it is; a data URL or plain base64 decoded."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        message = "must be base64 text, a data URL, or an uploaded file"
        raise ValueError(message)
    try:
        return base64.b64decode(_DATA_URL.sub("", value, count=1), validate=True)
    except binascii.Error as error:
        message = "neither base64 nor a data URL (data:image/png;base64,...)"
        raise ValueError(message) from error


ImageBytes = Annotated[
    bytes,
    BeforeValidator(_image_bytes),
    WithJsonSchema({"type": "string", "description": "Base64, or a data URL, of an image file."}),
]
ImageSource = Annotated[
    bytes | RemoteImage,
    BeforeValidator(_image_source),
    WithJsonSchema(
        {
            "type": "string",
            "description": "Base64, or a data URL, of an image file; or its address (http, https), "
            "where the server allows it.",
        }
    ),
]
Text = Annotated[str, Field(min_length=1)]
ItemId = Annotated[str, Field(min_length=1, max_length=256)]
ModelName = Annotated[
    str | None,
    Field(max_length=128, description="A name or fingerprint of `/v1/models`; none: the default."),
]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    request_id: str


class Health(_Schema):
    status: str


class ClassifyRequest(_Schema):
    """Give either labels or the name of a label set."""

    images: list[ImageSource] = Field(min_length=1)
    labels: Annotated[list[Text], Field(min_length=1)] | None = None
    label_set: str | None = None
    """One of `/v1/label-sets`; its templates, mode, calibration and threshold apply."""
    templates: list[str] | None = Field(default=None, min_length=1, max_length=100)
    """`{}` stands for the label; the embeddings of all templates are averaged. `plain`, `photo`
    and `drawing` stand for several. Default: the label alone."""
    mode: Literal["exclusive", "independent"] | None = None
    """`exclusive`, the default: exactly one label holds. `independent`: any number may."""
    top_k: int = Field(default=10, ge=1, le=1000)
    """Most labels an image, best first."""
    none_threshold: float | None = Field(default=None, ge=0, le=1)
    """Below this largest probability, an image shows none of the labels."""
    model: ModelName = None

    @model_validator(mode="after")
    def _names_classes_once(self) -> "ClassifyRequest":
        if (self.labels is None) == (self.label_set is None):
            message = "give exactly one of labels and label_set"
            raise ValueError(message)
        if self.label_set is not None and self.templates is not None:
            message = "templates belong to the label set; store it with others"
            raise ValueError(message)
        return self


class PredictionOut(_Schema):
    label: str
    probability: float
    score: float
    """Cosine similarity, -1 to 1."""


class ClassifyResult(_Schema):
    predictions: list[PredictionOut]
    none_of_these: bool | None = None
    """Whether no label is probable enough; null where no threshold was given."""


class ClassifyResponse(_Schema):
    model: str
    results: list[ClassifyResult]
    label_set_version: str | None = None
    calibrated: bool = False
    """Whether the label set was calibrated for this model and mode."""


class SearchRequest(_Schema):
    """Exactly one of text, image and id."""

    text: Text | None = None
    """What the pictures should show."""
    image: ImageSource | None = None
    """Pictures like this one: a file, base64, a data URL or an address."""
    id: ItemId | None = None
    """More like this stored item."""
    limit: int = Field(default=20, ge=1, le=200)
    filter: dict[str, str | int | float | bool] = {}
    """Metadata values that every result must have."""


class HitOut(_Schema):
    id: str
    score: float
    """Cosine similarity, -1 to 1."""
    text: str | None
    metadata: dict[str, Any]
    thumbnail: str | None
    """Path of a small picture on this server."""


class SearchResponse(_Schema):
    results: list[HitOut]
    items: int
    """Size of the collection."""
    milliseconds: float


class ItemIn(_Schema):
    id: ItemId | None = None
    """Left out: a hash of the content."""
    image: ImageBytes | None = None
    text: Text | None = None
    metadata: dict[str, Any] = {}

    @field_validator("metadata")
    @classmethod
    def _is_small_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        # Lone surrogates and infinite numbers cannot be stored: both raise a ValueError here.
        size = len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
        if size > _MAX_METADATA_BYTES:
            message = f"at most {_MAX_METADATA_BYTES} bytes of JSON, found {size}"
            raise ValueError(message)
        return value


class ItemsRequest(_Schema):
    items: list[ItemIn] = Field(min_length=1)


class AddedItems(_Schema):
    ids: list[str]


class ItemOut(_Schema):
    id: str
    text: str | None
    metadata: dict[str, Any]
    thumbnail: str | None
