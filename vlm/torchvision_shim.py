"""Lets a CUDA-linked torchvision import beside a CPU build of torch.

torchvision 0.28 exists only linked to CUDA. Beside a CPU torch its compiled operators do not load,
and `import torchvision` dies with `operator torchvision::nms does not exist`. Declaring the missing
operators' schemas is enough for the transforms, for timm and for open_clip, which never call them;
`torchvision.ops.nms` itself stays unavailable.

The shim is an import hook, so it costs nothing until somebody imports torchvision, and it does
nothing where torchvision imports by itself.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
from types import ModuleType
from typing import Any

__all__ = ["install"]

_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_MAX_OPERATORS = 32

# torch forgets the schemas when the Library object dies, so it lives as long as the process.
_libraries: list[Any] = []


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        for _ in range(_MAX_OPERATORS):
            try:
                return self._loader.exec_module(module)
            except RuntimeError as error:
                missing = _MISSING.search(str(error))
                if missing is None:
                    raise
                _declare(missing.group(1))
                for name in [n for n in sys.modules if n.startswith("torchvision.")]:
                    del sys.modules[name]
        message = f"torchvision still misses operators after {_MAX_OPERATORS} were declared"
        raise ImportError(message)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Put the hook in front of the import system, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _declare(operator: str) -> None:
    from torch.library import Library  # noqa: PLC0415 - torch costs seconds; most imports need none

    library = Library("torchvision", "FRAGMENT")
    library.define(_SCHEMAS.get(operator, f"{operator}(Tensor input) -> Tensor"))
    _libraries.append(library)
