"""Fields of kinds that Kubernetes does not have, read out of packages without importing them.

The packages pin older versions of what we use, or take long to import, so they are installed beside
the environment: `make install-dev` puts them into build/kinds.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = Path(__file__).parents[2] / "build/kinds"
Models = dict[str, dict[str, str]]
"""Types of each model's fields, by the names of YAML; of a list, those of its items."""


def unknown_fields(document: Any, model: str, models: Models, path: str = "") -> list[str]:
    """Where a document has fields that a model does not; types of Kubernetes itself are open."""
    if isinstance(document, list):
        items = enumerate(document)
        return [f for n, item in items for f in unknown_fields(item, model, models, f"{path}.{n}")]
    if not isinstance(document, dict) or model not in models:
        return []
    types = models[model]
    found = [f"{path}.{key}" for key in document if key not in types]
    for key in document.keys() & types.keys():
        found += unknown_fields(document[key], types[key], models, f"{path}.{key}")
    return sorted(found)


@functools.cache
def kserve_models() -> Models:
    """Of KServe's Python package: two tables in each class."""
    found = {}
    for path in (PACKAGES / "kserve/models").glob("*.py"):
        for node in _classes(path):
            tables = {
                target.id: ast.literal_eval(line.value)
                for line in node.body
                if isinstance(line, ast.Assign)
                for target in line.targets
                if isinstance(target, ast.Name)
            }
            names, types = tables.get("attribute_map", {}), tables.get("openapi_types", {})
            found[node.name] = {
                names[key]: re.sub(r"^list\[(.*)\]$", r"\1", types[key]) for key in names
            }
    return found


@functools.cache
def prometheus_models() -> Models:
    """Of the Prometheus operator's kinds: annotated fields, some of them with an alias."""
    path = PACKAGES / "cloudcoil/models/prometheus_operator/v1.py"
    classes = list(_classes(path))
    known = {node.name for node in classes}
    found: Models = {}
    for node in classes:
        fields = found.setdefault(node.name, {})
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                text = ast.unparse(line.annotation)
                alias = re.search(r"alias='(\w+)'", text)
                types = [name for name in re.findall(r"\w+", text) if name in known]
                fields[alias[1] if alias else line.target.id] = types[0] if types else ""
    return found


def _classes(path: Path) -> Iterator[ast.ClassDef]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            yield node
