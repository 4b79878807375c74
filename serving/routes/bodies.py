"""Request bodies that may be JSON or an upload, checked by one schema either way."""

import json
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

__all__ = ["body_schema", "parse_body"]

SchemaT = TypeVar("SchemaT", bound=BaseModel)
_MAX_FILES = 256
_MAX_FIELDS = 4096


async def parse_body(
    request: Request, schema: type[SchemaT], *, lists: tuple[str, ...] = ()
) -> SchemaT:
    """The body as `schema`, from `application/json` or `multipart/form-data`.

    In an upload each field is a string or a file; the fields in `lists` may be repeated, and
    objects (`filter`, `metadata`) are given as JSON text.

    Raises:
        RequestValidationError: If it does not fit; the answer is a 422 that names the field.
        HTTPException: 415 for another content type.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "application/json":
        tree = await _json(request)
    elif content_type == "multipart/form-data":
        tree = await _form(request, lists)
    else:
        detail = (
            f"content type {content_type!r} is not understood; send application/json or "
            f"multipart/form-data"
        )
        raise HTTPException(415, detail)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        details = [
            {**detail, "loc": ("body", *detail["loc"])}
            for detail in error.errors(include_url=False, include_input=False)
        ]
        raise RequestValidationError(details) from error


def body_schema(schema: type[BaseModel], files: tuple[str, ...]) -> dict[str, Any]:
    """The OpenAPI `requestBody` of a route that uses `parse_body`."""
    reference = schema.model_json_schema(ref_template="#/components/schemas/{model}")
    reference.pop("$defs", None)
    properties = {
        name: {"type": "array", "items": {"type": "string", "format": "binary"}}
        if reference["properties"][name].get("type") == "array"
        else {"type": "string", "format": "binary"}
        for name in files
    }
    upload = {"type": "object", "properties": {**reference["properties"], **properties}}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": reference},
                "multipart/form-data": {"schema": upload},
            },
        }
    }


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        detail = {"type": "json_invalid", "loc": ("body",), "msg": "not valid JSON"}
        raise RequestValidationError([detail]) from error


async def _form(request: Request, lists: tuple[str, ...]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    async with request.form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS) as form:
        for name, value in form.multi_items():
            plain = await value.read() if isinstance(value, UploadFile) else _object(value)
            if name in lists:
                tree.setdefault(name, []).append(plain)
            else:
                tree[name] = plain
    return tree


def _object(value: str) -> Any:
    """A form field that holds a JSON object, or else the text itself."""
    if value.lstrip().startswith("{"):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if isinstance(parsed, dict):
            return parsed
    return value
