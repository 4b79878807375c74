"""Bodies of the open inference protocol: JSON, and raw tensors behind it (binary extension).

A body is JSON alone, or `Inference-Header-Content-Length` bytes of JSON followed by the tensors
that name a `binary_data_size`, in order. Elements of BYTES tensors are each preceded by their
length in 4 bytes, little-endian.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Protocol

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from serving.encoding import from_base64
from serving.errors import BadInputError
from serving.schemas import Several

__all__ = [
    "HEADER_LENGTH",
    "InferRequest",
    "Matrix",
    "ServerOut",
    "TensorIn",
    "TensorMetadata",
    "TensorModelOut",
    "Tensors",
    "answer_body",
    "parse_tensors",
]

HEADER_LENGTH: Final = "inference-header-content-length"


class _Schema(BaseModel):
    # The protocol lets clients send parameters that a server does not know.
    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)


def _not_numbers(value: object) -> object:
    inner = value[0] if isinstance(value, list) and value else None
    while isinstance(inner, list) and inner:
        inner = inner[0]
    if isinstance(inner, int | float):
        message = "numbers are not understood; give texts, or image files in base64 (BYTES)"
        raise ValueError(message)
    return value


class TensorIn(_Schema):
    """One input: texts, or image files."""

    name: str
    datatype: str
    shape: Several[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=4)
    parameters: dict[str, Any] = {}
    data: Annotated[Several[str | Several[str]] | None, BeforeValidator(_not_numbers)] = None
    """Texts, or image files in base64; left out where raw bytes follow the JSON."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class TensorWanted(_Schema):
    """One output that shall be answered."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(_Schema):
    """Of the open inference protocol: `image` and `text`, one of them at least."""

    id: str | None = None
    inputs: Several[TensorIn] = Field(min_length=1)
    outputs: Several[TensorWanted] | None = None
    parameters: dict[str, Any] = {}


class ServerOut(_Schema):
    """What the server is."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(_Schema):
    """An input or output of the model; -1 stands for any number."""

    name: str
    datatype: str
    shape: list[int]


class TensorModelOut(_Schema):
    """The model, as the protocol describes one."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Matrix(Protocol):
    """A matrix of floats, as the services return it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    def ravel(self) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """What a request brings."""

    request: InferRequest
    elements: dict[str, list[bytes]]
    """By the name of the input; texts in UTF-8, images as files."""

    def wants_binary(self, output: str) -> bool:
        """Whether an output shall be raw bytes: said of itself, or of all."""
        named = {entry.name: entry.parameters for entry in self.request.outputs or []}
        default = self.request.parameters.get("binary_data_output", False)
        return bool(named.get(output, {}).get("binary_data", default))


def parse_tensors(body: bytes, header_length: str | None, *, known: Sequence[str]) -> Tensors:
    """The tensors of a request.

    Args:
        body: As it came.
        header_length: The header of that name, if the body has raw tensors.
        known: Names of inputs that may be given.

    Raises:
        RequestValidationError: If the JSON is none, or does not fit.
        BadInputError: If a tensor is unknown, or its data do not fit its shape.
    """
    size = len(body) if header_length is None else _header_size(header_length, len(body))
    request = _parsed(body[:size])
    rest = memoryview(body)[size:]
    elements: dict[str, list[bytes]] = {}
    for tensor in request.inputs:
        _check(tensor, known, elements)
        raw = tensor.parameters.get("binary_data_size")
        if raw is None:
            found = _from_json(tensor)
        else:
            if not isinstance(raw, int) or not 0 <= raw <= len(rest):
                message = f"{tensor.name}: binary_data_size {raw!r}, and {len(rest)} bytes are left"
                raise BadInputError(message)
            found, rest = _from_raw(tensor.name, bytes(rest[:raw])), rest[raw:]
        if len(found) != tensor.num_elements:
            message = f"{tensor.name}: shape {tensor.shape} and {len(found)} elements"
            raise BadInputError(message)
        elements[tensor.name] = found
    if len(rest):
        message = f"{len(rest)} bytes follow the last tensor"
        raise BadInputError(message)
    return Tensors(request=request, elements=elements)


def answer_body(
    head: Mapping[str, Any], outputs: Mapping[str, Matrix], tensors: Tensors
) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON where raw tensors follow."""
    entries, raw = [], []
    for name, matrix in outputs.items():
        entry: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(matrix.shape)}
        if tensors.wants_binary(name):
            raw.append(matrix.ravel().astype("<f4").tobytes())
            entry["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            entry["data"] = matrix.ravel().tolist()
        entries.append(entry)
    text = json.dumps({**head, "outputs": entries}, separators=(",", ":")).encode()
    return b"".join([text, *raw]), len(text) if raw else None


def _header_size(text: str, body: int) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 12 or int(text) > body:
        message = f"{HEADER_LENGTH} is {text[:32]!r}, and the body has {body} bytes"
        raise BadInputError(message)
    return int(text)


def _parsed(text: bytes) -> InferRequest:
    try:
        return InferRequest.model_validate_json(text)
    except ValidationError as error:
        details = [
            {**detail, "loc": ("body", *detail["loc"])}
            for detail in error.errors(include_url=False, include_input=False)
        ]
        raise RequestValidationError(details) from error


def _check(tensor: TensorIn, known: Sequence[str], seen: Mapping[str, object]) -> None:
    if tensor.name not in known or tensor.name in seen:
        message = f"input {tensor.name[:64]!r}: give each of {', '.join(known)} at most once"
        raise BadInputError(message)
    if tensor.datatype != "BYTES":
        message = (
            f"{tensor.name}: datatype {tensor.datatype[:64]!r}, expected BYTES: "
            f"image files as they are, and texts; the server prepares them itself"
        )
        raise BadInputError(message)


def _from_json(tensor: TensorIn) -> list[bytes]:
    texts = [text for row in tensor.data or [] for text in ([row] if isinstance(row, str) else row)]
    try:
        if tensor.name == "image":
            return [from_base64(text) for text in texts]
        return [text.encode() for text in texts]
    except ValueError as error:
        message = f"{tensor.name}: images in JSON are base64, texts are Unicode ({error})"
        raise BadInputError(message) from error


def _from_raw(name: str, data: bytes) -> list[bytes]:
    found: list[bytes] = []
    start = 0
    while start < len(data):
        (length,) = (
            struct.unpack_from("<I", data, start) if start + 4 <= len(data) else (len(data),)
        )
        start += 4
        if start + length > len(data):
            message = f"{name}: element {len(found)} is longer than its tensor"
            raise BadInputError(message)
        found.append(data[start : start + length])
        start += length
    return found
