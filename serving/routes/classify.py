"""`POST /v1/classify`."""

from fastapi import APIRouter, Request

from serving.routes.bodies import body_schema, parse_body
from serving.routes.classes import label_set_of
from serving.routes.direct import DirectRoute
from serving.routes.state import Services, ServicesDep, refuse_more_than
from serving.schemas import ClassifyRequest, ClassifyResponse, ClassifyResult, PredictionOut
from serving.services.classification import (
    Classes,
    Mode,
    Verdict,
    classify,
    described_classes,
)
from serving.services.embedding import Embedder
from serving.services.label_sets import check_label_set, with_version
from vlm.inference import expanded_templates

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["classification"], route_class=DirectRoute)
_LISTS = ("images", "labels", "templates")


@router.post("/classify", openapi_extra=body_schema(ClassifyRequest, ("images",)))
async def classify_images(request: Request, services: ServicesDep) -> ClassifyResponse:
    """Tell which of the labels, given or stored, each image shows, without training on them."""
    body = await parse_body(request, ClassifyRequest, lists=_LISTS, objects=("classes",))
    refuse_more_than(services.settings.max_images, len(body.images), "images")
    embedder = services.embedder(body.model)
    if body.label_set is not None:
        return await _among_stored(body, body.label_set, embedder, services)
    mode = body.mode or "exclusive"
    classes = await _described(body, mode, embedder, services)
    verdicts = await _verdicts(body, embedder, classes, mode, body.none_threshold)
    return ClassifyResponse(model=embedder.info.fingerprint, results=_results(verdicts))


async def _described(
    body: ClassifyRequest, mode: Mode, embedder: Embedder, services: Services
) -> Classes:
    settings, labels, templates = services.settings, body.labels or [], body.templates or ["{}"]
    if body.classes is not None:
        label_set = await label_set_of(body.classes, templates, mode, services)
        check_label_set(label_set)
        asked = await with_version(label_set)
        return await services.label_sets.classes(asked, embedder, mode)
    prompts = len(labels) * len(expanded_templates(templates))
    refuse_more_than(settings.max_labels, prompts, "prompts")
    longest = max(map(len, [*labels, *templates]))
    refuse_more_than(settings.max_text_characters, longest, "characters of a label or template")
    return await described_classes(embedder, labels, templates)


async def _among_stored(
    body: ClassifyRequest, name: str, embedder: Embedder, services: Services
) -> ClassifyResponse:
    asked = await services.label_sets.get(name)
    label_set = asked.label_set
    mode = body.mode or label_set.mode
    calibration = label_set.calibration_for(embedder.info.fingerprint, mode)
    classes = await services.label_sets.classes(asked, embedder, mode)
    threshold = body.none_threshold
    if threshold is None:
        threshold = label_set.none_threshold
    if threshold is None and calibration is not None:
        threshold = calibration.none_threshold
    verdicts = await _verdicts(body, embedder, classes, mode, threshold)
    return ClassifyResponse(
        model=embedder.info.fingerprint,
        results=_results(verdicts),
        label_set_version=asked.version,
        calibrated=calibration is not None,
    )


async def _verdicts(
    body: ClassifyRequest,
    embedder: Embedder,
    classes: Classes,
    mode: Mode,
    none_threshold: float | None,
) -> list[Verdict]:
    return await classify(
        embedder,
        body.images,
        classes,
        mode=mode,
        top_k=body.top_k,
        none_threshold=none_threshold,
    )


def _results(verdicts: list[Verdict]) -> list[ClassifyResult]:
    return [
        ClassifyResult(
            predictions=[PredictionOut.model_validate(vars(p)) for p in verdict.predictions],
            none_of_these=verdict.none_of_these,
        )
        for verdict in verdicts
    ]
