"""Request bodies that may be JSON or an upload, checked by one schema either way."""

import asyncio
import json
from collections.abc import Callable
from email.message import Message
from typing import Any, NoReturn, ParamSpec, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

__all__ = ["body_schema", "parse_body", "parse_optional_body", "where_it_pays"]

SchemaT = TypeVar("SchemaT", bound=BaseModel)
ResultT = TypeVar("ResultT")
Arguments = ParamSpec("Arguments")
_AT_ONCE = 64 * 1024
"""Bytes that take less time than a thread needs to begin."""
_MAX_FILES = 256
_MAX_FIELDS = 4096
"""Of an upload, and of each object in JSON."""


async def parse_body(
    request: Request,
    schema: type[SchemaT],
    *,
    lists: tuple[str, ...] = (),
    objects: tuple[str, ...] = (),
) -> SchemaT:
    """The body as `schema`, from `application/json` or `multipart/form-data`.

    Parsing megabytes of base64 takes a while, so it is done off the event loop.

    Args:
        request: Whose body is read.
        schema: What it must be.
        lists: Fields that an upload may repeat.
        objects: Fields that an upload gives as JSON text.

    Raises:
        RequestValidationError: If it does not fit; the answer is a 422 that names the field.
        HTTPException: 415 for another content type or a compressed body, 400 for an upload that
            was cut off.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        detail = f"content encoding {encoding[:64]!r} is not understood; send the body as it is"
        raise HTTPException(415, detail)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "application/json":
        body = await request.body()
        return await where_it_pays(len(body), _from_json, schema, body)
    if content_type == "multipart/form-data":
        return await asyncio.to_thread(_validated, schema, await _form(request, lists, objects))
    detail = (
        f"content type {content_type!r} is not understood; send application/json or "
        f"multipart/form-data"
    )
    raise HTTPException(415, detail)


async def parse_optional_body(request: Request, schema: type[SchemaT]) -> SchemaT:
    """As `parse_body`; where there is no body, what the schema is without any field."""
    return await parse_body(request, schema) if await request.body() else schema()


async def where_it_pays(
    size: int,
    function: Callable[Arguments, ResultT],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> ResultT:
    """What `function` makes of so many bytes; of many in a thread, so that others go on."""
    if size <= _AT_ONCE:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


def body_schema(
    schema: type[BaseModel], files: tuple[str, ...] = (), *, required: bool = True
) -> dict[str, Any]:
    """The OpenAPI `requestBody` of a route that uses `parse_body`.

    Args:
        schema: Of the JSON body.
        files: Fields that are files in an upload; with none, uploads are not mentioned.
        required: Whether there must be a body.
    """
    reference = schema.model_json_schema(ref_template="#/components/schemas/{model}")
    reference.pop("$defs", None)
    content = {"application/json": {"schema": reference}}
    if files:
        properties = {
            name: {"type": "array", "items": {"type": "string", "format": "binary"}}
            if reference["properties"][name].get("type") == "array"
            else {"type": "string", "format": "binary"}
            for name in files
        }
        upload = {"type": "object", "properties": {**reference["properties"], **properties}}
        content["multipart/form-data"] = {"schema": upload}
    return {"requestBody": {"required": required, "content": content}}


def _from_json(schema: type[SchemaT], body: bytes) -> SchemaT:
    try:
        tree = _parsed(body)
    except (ValueError, RecursionError) as error:
        said = str(error) if isinstance(error, _TooManyKeysError) else "not valid JSON"
        detail = {"type": "json_invalid", "loc": ("body",), "msg": said}
        raise RequestValidationError([detail]) from error
    return _validated(schema, tree)


def _validated(schema: type[SchemaT], tree: Any) -> SchemaT:
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        details = [
            {**detail, "loc": ("body", *detail["loc"])}
            for detail in error.errors(include_url=False, include_input=False)
        ]
        raise RequestValidationError(details) from error


async def _form(
    request: Request, lists: tuple[str, ...], objects: tuple[str, ...]
) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    body = await request.body()
    _refuse_if_cut(body, request.headers["content-type"])
    # A part may be as long as the body, which is bounded, and held already.
    limits = {"max_files": _MAX_FILES, "max_fields": _MAX_FIELDS, "max_part_size": len(body)}
    try:
        form = await request.form(**limits)
    except UnicodeError as error:  # a charset such as punycode, which fits no names of fields
        detail = "the charset of the upload does not fit its fields; send UTF-8"
        raise HTTPException(415, detail) from error
    try:
        for name, value in form.multi_items():
            plain = await value.read() if isinstance(value, UploadFile) else value
            if name in lists:
                tree.setdefault(name, []).append(plain)
            elif name in objects:
                tree[name] = _object(plain)
            else:
                tree[name] = plain
    finally:
        await form.close()
    return tree


def _refuse_if_cut(body: bytes, content_type: str) -> None:
    """The parser takes what it got of the last field for all of it, or leaves the field out."""
    message = Message()
    message["content-type"] = content_type
    boundary = message.get_boundary()
    if boundary is not None and f"--{boundary}--".encode() not in body:
        detail = "the upload was cut off: it has no closing boundary"
        raise HTTPException(400, detail)


def _object(value: str | bytes) -> Any:
    """The JSON of a form field; what is not JSON is left for the schema to refuse."""
    try:
        return _parsed(value)
    except (ValueError, RecursionError):
        return value


class _TooManyKeysError(ValueError):
    pass


def _parsed(text: str | bytes) -> Any:
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object_of)


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless it has so many keys that telling which are unknown would take seconds."""
    if len(pairs) > _MAX_FIELDS:
        message = f"an object of {len(pairs)} keys; at most {_MAX_FIELDS} are understood"
        raise _TooManyKeysError(message)
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity are Python's, not JSON's; no answer could carry them back."""
    raise ValueError(name)
