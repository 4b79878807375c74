"""`/v1/label-sets`: classes that are stored under a name."""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from serving.routes.bodies import body_schema, parse_body
from serving.routes.classes import label_set_of, with_kept_images
from serving.routes.state import ServicesDep, refuse_more_than
from serving.schemas import ClassIn, ImageBytes, ModelName, Several, Text
from serving.services.calibration import LabelledImage, fit_calibration
from serving.services.classification import check_mode
from serving.services.label_sets import Calibration, VersionedSet, check_weights

__all__ = ["CalibrateRequest", "LabelSetRequest", "router"]

router = APIRouter(prefix="/v1/label-sets", tags=["classification"])


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class LabelSetRequest(_Schema):
    """Classes, and how they are to be asked about."""

    classes: Several[Text | ClassIn] = Field(min_length=1)
    """A text alone is a class by words."""
    templates: Several[str] = Field(default=["{}"], min_length=1, max_length=100)
    mode: Literal["exclusive", "independent"] = "exclusive"
    none_threshold: float | None = Field(default=None, ge=0, le=1)
    """Below this largest probability, an image shows none of the classes."""


class ClassOut(_Schema):
    """A class, without its pictures."""

    label: str
    prompts: list[str] | None
    num_images: int
    image_weight: float


class CalibrationOut(_Schema):
    """What a labelled sample taught about one model."""

    model: str
    """Its fingerprint."""
    mode: str
    temperature: float
    none_threshold: float | None
    num_samples: int
    num_none: int
    accuracy: float
    ece_before: float
    ece_after: float
    note: str | None = None
    """What to make of it, where the sample did not settle the temperature."""


class LabelSetOut(_Schema):
    """A stored set."""

    name: str
    version: str
    """A hash of everything that decides the rows of its classes."""
    classes: list[ClassOut]
    templates: list[str]
    mode: str
    none_threshold: float | None
    calibrations: list[CalibrationOut]


class LabelSetNames(_Schema):
    """What is stored."""

    label_sets: list[str]


class SampleIn(_Schema):
    """An image, and what it shows."""

    image: ImageBytes
    label: Text | None
    """Null: none of the classes."""


class CalibrateRequest(_Schema):
    """A labelled sample, better of some hundred images that were not used for anything else."""

    samples: Several[SampleIn] = Field(min_length=2)
    model: ModelName = None


@router.get("")
async def names(services: ServicesDep) -> LabelSetNames:
    """The names of all stored sets."""
    return LabelSetNames(label_sets=await services.label_sets.names())


@router.get("/{name}")
async def get(name: str, services: ServicesDep) -> LabelSetOut:
    """One set, with what was calibrated."""
    return _out(name, await services.label_sets.get(name))


@router.put("/{name}", openapi_extra=body_schema(LabelSetRequest))
async def put(name: str, request: Request, services: ServicesDep) -> LabelSetOut:
    """Store a set, replacing one of that name; on disk when this is answered."""
    body = await parse_body(request, LabelSetRequest)
    infos = [model.info for model in services.registry.served()]
    check_mode(body.mode, *infos)
    label_set = await label_set_of(body.classes, body.templates, body.mode, services)
    check_weights(label_set.classes, *infos)
    kept = await with_kept_images(label_set, services)
    kept = kept.model_copy(update={"none_threshold": body.none_threshold})
    return _out(name, await services.label_sets.put(name, kept))


@router.delete("/{name}", status_code=204)
async def delete(name: str, services: ServicesDep) -> None:
    """Remove one set."""
    await services.label_sets.delete(name)


@router.post("/{name}/calibrate", openapi_extra=body_schema(CalibrateRequest))
async def calibrate(name: str, request: Request, services: ServicesDep) -> CalibrationOut:
    """Fit temperature and "none of these" of a set to a labelled sample, for one model.

    The fit is kept with the set and used from then on, until the set is changed.
    """
    body = await parse_body(request, CalibrateRequest)
    refuse_more_than(services.settings.max_calibration_images, len(body.samples), "samples")
    embedder = services.embedder(body.model)
    asked = await services.label_sets.get(name)
    mode = asked.label_set.mode
    classes = await services.label_sets.classes(asked, embedder, mode)
    samples = [LabelledImage(image=s.image, label=s.label) for s in body.samples]
    found = await fit_calibration(embedder, classes, samples, mode=mode)
    model = embedder.info.fingerprint
    await services.label_sets.calibrate(name, asked.version, model, found)
    return _calibration(model, found)


def _out(name: str, found: VersionedSet) -> LabelSetOut:
    label_set = found.label_set
    return LabelSetOut(
        name=name,
        version=found.version,
        classes=[
            ClassOut(
                label=c.label,
                prompts=c.prompts,
                num_images=len(c.images),
                image_weight=c.image_weight,
            )
            for c in label_set.classes
        ],
        templates=label_set.templates,
        mode=label_set.mode,
        none_threshold=label_set.none_threshold,
        calibrations=[_calibration(m, c) for m, c in sorted(label_set.calibrations.items())],
    )


def _calibration(model: str, found: Calibration) -> CalibrationOut:
    return CalibrationOut(model=model, note=found.note, **found.model_dump())
