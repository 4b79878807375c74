"""Typed configuration: one YAML file is one run, `dotted.key=value` overrides it.

Config classes live beside the code they configure and derive from `Config`: frozen, and unknown
keys are errors. `load_config` reports every wrong key at once, with the file, the dotted key, what
was found and the nearest name that exists.
"""

import difflib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, ValidationError

from vlm.errors import ConfigError

__all__ = ["Config", "apply_overrides", "load_config", "type_or", "validate_config"]


class Config(BaseModel):
    """Base of every configuration section: immutable, and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def type_or(default: str) -> Discriminator:
    """What tells the members of a union apart: their `type`, which is `default` where left out."""

    def kind(tree: Any) -> Any:
        return tree.get("type", default) if isinstance(tree, dict) else getattr(tree, "type", None)

    return Discriminator(kind)


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(config_class: type[ConfigT], path: Path | None, overrides: list[str]) -> ConfigT:
    """Read a YAML file, if one is given, apply `dotted.key=value` overrides and validate.

    Raises:
        ConfigError: If the file is missing or not a YAML mapping, an override is malformed, or any
            key or value is wrong. All wrong keys are listed, one a line.
    """
    if path is None:
        return validate_config(config_class, apply_overrides({}, overrides), source="settings")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        message = f"{path}: cannot read this configuration ({error.strerror}). Check the path."
        raise ConfigError(message) from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        message = f"{path}: not valid YAML: {error}"
        raise ConfigError(message) from error
    if not isinstance(tree, dict):
        message = f"{path}: expected a mapping of keys to values, found {type(tree).__name__}"
        raise ConfigError(message)
    return validate_config(config_class, apply_overrides(tree, overrides), source=str(path))


def validate_config(config_class: type[ConfigT], tree: dict[str, Any], *, source: str) -> ConfigT:
    """Build `config_class` from a plain tree; `source` names it in error messages."""
    try:
        return config_class.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(config_class, detail) for detail in error.errors(include_url=False)]
        message = "\n".join([f"{source}:", *(f"  {line}" for line in lines)])
        raise ConfigError(message) from error


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return a copy of `tree` with each `dotted.key=value` set; values are parsed as YAML.

    List items are addressed by index: `loss.1.weight=0.2`. A dict key may be new (validation
    refuses it later, with a suggestion); a list index must exist.
    """
    result: dict[str, Any] = yaml.safe_load(yaml.safe_dump(tree))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            message = f"override {override!r}: expected dotted.key=value, e.g. optim.lr=3e-5"
            raise ConfigError(message)
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            message = f"override {override!r}: the value is not valid YAML: {error}"
            raise ConfigError(message) from error
        _set(result, key.split("."), parsed, override)
    return result


def _set(node: Any, keys: list[str], value: Any, override: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                where = ".".join(keys[:depth]) or "the list"
                message = (
                    f"override {override!r}: {where} has {len(node)} items, "
                    f"so the index must be 0 to {len(node) - 1}, found {key!r}"
                )
                raise ConfigError(message)
            if last:
                node[int(key)] = value
            else:
                node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            else:
                child = node.setdefault(key, {})
                node[key] = node = {} if child is None else child
        else:
            where = ".".join(keys[:depth])
            message = f"override {override!r}: {where} is the value {node!r}, it has no keys"
            raise ConfigError(message)


def _explain(config_class: type[Config], detail: Any) -> str:
    """One line of a ConfigError: dotted key, what was found, what was allowed."""
    location: tuple[str | int, ...] = detail["loc"]
    dotted = ".".join(str(part) for part in location)
    if detail["type"] == "extra_forbidden":
        known = _known_keys(config_class, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{dotted}: no such key; {hint}"
    if detail["type"] == "missing":
        return f"{dotted}: this key is required"
    if detail["type"] == "union_tag_not_found":
        kinds = ", ".join(str(_tag(c)) for c in _classes_at(config_class, location))
        return f"{dotted}.type: this key is required beside the others; one of {kinds}"
    found = detail.get("input")
    shown = f", found {found!r}" if isinstance(found, str | int | float | bool | None) else ""
    return f"{dotted or 'the whole file'}: {detail['msg']}{shown}"


def _known_keys(config_class: type[Config], location: tuple[str | int, ...]) -> list[str]:
    """Field names of the (union of) config classes that `location` leads to."""
    return [name for c in _classes_at(config_class, location) for name in c.model_fields]


def _classes_at(config_class: type[Config], location: tuple[str | int, ...]) -> list[type[Config]]:
    """The config classes, several if it is a union, that `location` leads to."""
    classes: list[type[Config]] = [config_class]
    for part in location:
        # pydantic puts the chosen tag of a discriminated union into the location
        tagged = [c for c in classes if _tag(c) == part]
        if tagged:
            classes = tagged
        elif isinstance(part, str):
            annotations = [
                c.model_fields[part].annotation for c in classes if part in c.model_fields
            ]
            classes = [found for a in annotations for found in _config_classes(a)]
    return classes


def _tag(config_class: type[Config]) -> object:
    field = config_class.model_fields.get("type")
    return field.default if field else None


def _config_classes(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_args(annotation):
        return [c for a in typing.get_args(annotation) for c in _config_classes(a)]
    return []
