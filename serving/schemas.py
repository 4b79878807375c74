"""The wire format: what requests must look like, and what answers do."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from serving.encoding import from_base64, without_data_url
from serving.services.fetching import RemoteImage

__all__ = [
    "AddedItems",
    "ClassIn",
    "ClassifyRequest",
    "ClassifyResponse",
    "DeleteRequest",
    "DeletedItems",
    "FilterIn",
    "Health",
    "ImageBytes",
    "ImageSource",
    "ItemIn",
    "ItemOut",
    "ItemsPage",
    "ItemsRequest",
    "ModelName",
    "Problem",
    "SearchRequest",
    "SearchResponse",
    "Several",
    "Text",
]

ItemT = TypeVar("ItemT")
Several = Annotated[list[ItemT], Field(fail_fast=True)]
"""The first that does not fit is told: a million of them would be a million messages."""
_MAX_METADATA_BYTES = 16_384
_MAX_METADATA_DEPTH = 32


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
        return from_base64(without_data_url(value))
    except ValueError as error:
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


def _addressable(item_id: str) -> str:
    if item_id in (".", ".."):
        message = f"{item_id!r} cannot be an id: clients drop it from a path; choose another"
        raise ValueError(message)
    if item_id.endswith("/thumbnail"):
        message = "an id cannot end with /thumbnail, the path of an item's picture"
        raise ValueError(message)
    return item_id


Text = Annotated[str, Field(min_length=1)]
ItemId = Annotated[str, Field(min_length=1, max_length=256)]
NewItemId = Annotated[ItemId, Field(pattern=r"^[^\x00-\x1f\x7f]+$"), AfterValidator(_addressable)]
"""One that a path can name, so that the item can be asked for again."""
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


class ClassIn(_Schema):
    """A class by words, by example images, or by both."""

    label: Text
    prompts: Annotated[Several[Text], Field(min_length=1, max_length=100)] | None = None
    """Texts in place of the label in the templates."""
    images: Several[ImageBytes] = []
    """Examples; in a label set kept without metadata, their shorter side 512 pixels at most."""
    image_weight: float = Field(default=0.5, ge=0, le=1)
    """Of the images against the words; 1: images alone."""


class ClassifyRequest(_Schema):
    """Give labels, classes, or the name of a label set."""

    images: Several[ImageSource] = Field(min_length=1)
    labels: Annotated[Several[Text], Field(min_length=1)] | None = None
    classes: Annotated[Several[Text | ClassIn], Field(min_length=1)] | None = None
    """Labels, some of which have examples, as in a label set that is not stored."""
    label_set: str | None = None
    """One of `/v1/label-sets`; its templates, mode, calibration and threshold apply."""
    templates: Several[str] | None = Field(default=None, min_length=1, max_length=100)
    """`{}` stands for the label; the embeddings of all templates are averaged. `plain`, `photo`
    and `drawing` stand for several. Default: the label alone."""
    mode: Literal["exclusive", "independent"] | None = None
    """`exclusive`, the default: exactly one label holds. `independent`: any number may."""
    top_k: int = Field(default=10, ge=1)
    """Most labels an image, best first; all of them, if there are fewer."""
    none_threshold: float | None = Field(default=None, ge=0, le=1)
    """Below this largest probability, an image shows none of the labels."""
    model: ModelName = None

    @model_validator(mode="after")
    def _names_classes_once(self) -> "ClassifyRequest":
        given = (self.labels, self.classes, self.label_set)
        if sum(each is not None for each in given) != 1:
            message = "give exactly one of labels, classes and label_set"
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


FilterScalar = str | int | float | bool


class FilterCondition(_Schema):
    """All that is given must hold; numbers for the bounds, a part of a text for `contains`."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, serialize_by_alias=True
    )

    one_of: Several[FilterScalar] | None = Field(None, alias="in", min_length=1, max_length=1000)
    contains: Text | None = None
    """Whatever the case of its letters."""
    gt: float | None = None
    gte: float | None = None
    lt: float | None = None
    lte: float | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "FilterCondition":
        if not self.model_fields_set:
            message = "give some of in, contains, gt, gte, lt, lte"
            raise ValueError(message)
        return self


FilterIn = dict[str, FilterScalar | FilterCondition]
"""By metadata key the value that an item must have, or conditions on it. All must hold."""


class PartIn(_Schema):
    """Exactly one of text, texts, image, id and vector, and how much it counts."""

    text: Text | None = None
    texts: Several[Text] | None = Field(default=None, min_length=1, max_length=32)
    """Several ways to say it, whose embeddings are averaged."""
    image: ImageSource | None = None
    id: ItemId | None = None
    vector: Several[float] | None = Field(default=None, max_length=65_536)
    """An embedding of the collection's own model; `model` must name it."""
    modality: Literal["text", "image"] = "text"
    """Of `vector`."""
    weight: float = Field(default=1.0, ge=-100, le=100)
    """Below 0: like the rest, but without this."""

    @model_validator(mode="after")
    def _is_one_thing(self) -> "PartIn":
        given = (self.text, self.texts, self.image, self.id, self.vector)
        if sum(each is not None for each in given) != 1:
            message = "give exactly one of text, texts, image, id and vector"
            raise ValueError(message)
        return self


class SearchRequest(_Schema):
    """Exactly one of text, image, id and parts."""

    text: Text | None = None
    """What the pictures should show."""
    image: ImageSource | None = None
    """Pictures like this one: a file, base64, a data URL or an address."""
    id: ItemId | None = None
    """More like this stored item."""
    parts: Several[PartIn] | None = Field(default=None, min_length=1, max_length=32)
    """Several of these, added up by their weights."""
    model: ModelName = None
    """If given, the collection must hold its vectors."""
    words: Text | None = None
    """Items whose text has these words are fused into the ranking; `score` is then the sum of
    1 / (60 + rank)."""
    geometry: Literal["auto", "raw", "centred"] = "auto"
    """`centred`: cosines after the mean of each modality was taken away. `auto`: where pictures are
    sought by pictures, texts by texts, by several parts, or both are ranked together."""
    diversity: float = Field(default=0.0, ge=0, le=1)
    """Above 0, each next result also has to differ from those before it."""
    group: float | None = Field(default=None, gt=0, le=1)
    """Cosine from which two results are nearly the same: the worse is folded into the better."""
    reduce_hubs: bool = False
    """Whether items that are near to every query count less (QB-Norm)."""
    calibrate: Literal["sigmoid", "percentile"] | None = None
    """What `calibrated` is: a probability (of models with a bias), or the share of the collection
    that fits less."""
    after: str | None = Field(default=None, max_length=2000)
    """`next` of the page before."""
    limit: int = Field(default=20, ge=1, le=200)
    collection: str | None = Field(default=None, max_length=64)
    """A name of `/v1/collections`; none: the default one."""
    filter: FilterIn = {}
    """What the metadata of every result must be: `{"style": "flat", "year": {"gte": 1990}}`."""


class HitOut(_Schema):
    id: str
    score: float
    """Cosine similarity, -1 to 1; of a search with `words` the fused score."""
    text: str | None
    metadata: dict[str, Any]
    thumbnail: str | None
    """Path of a small picture on this server."""
    modality: Literal["image", "text"] = "image"
    """What was compared."""
    calibrated: float | None = None
    """0 to 1, where it was asked for."""
    duplicates: list[str] = []
    """Ids of worse results that are nearly the same, where they were asked for."""


class SearchResponse(_Schema):
    results: list[HitOut]
    items: int
    """Size of the collection."""
    centred: bool = False
    """Whether the means of the modalities were taken away."""
    next: str | None = None
    """Give it as `after` for the next page; null: there is none."""
    milliseconds: float


def _is_deeper_than(depth: int, value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if depth == 0:
        return isinstance(value, dict | list)
    return any(_is_deeper_than(depth - 1, part) for part in inner)


class ItemIn(_Schema):
    id: NewItemId | None = None
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
        if _is_deeper_than(_MAX_METADATA_DEPTH, value):
            message = f"at most {_MAX_METADATA_DEPTH} objects and arrays within each other"
            raise ValueError(message)
        return value


class ItemsRequest(_Schema):
    items: Several[ItemIn] = Field(min_length=1)


class AddedItems(_Schema):
    ids: list[str]


class DeleteRequest(_Schema):
    """Exactly one of ids and filter."""

    ids: Several[ItemId] | None = Field(None, min_length=1, max_length=10_000)
    filter: FilterIn | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _says_what(self) -> "DeleteRequest":
        if (self.ids is None) == (self.filter is None):
            message = "give exactly one of ids and filter"
            raise ValueError(message)
        return self


class DeletedItems(_Schema):
    deleted: int
    """How many of them there were."""


class ItemOut(_Schema):
    id: str
    text: str | None
    metadata: dict[str, Any]
    thumbnail: str | None


class ListedItem(ItemOut):
    modality: Literal["image", "text"]
    """What the vector is of."""
    vector: list[float] | None = None


class ItemsPage(_Schema):
    items: list[ListedItem]
    """In the order of their ids."""
    next: str | None
    """Give it as `after` for the next page; null: this was the last one."""
    total: int
    """Items of the collection that fulfil the filter."""
