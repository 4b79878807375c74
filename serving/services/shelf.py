"""Where bundles lie: in a folder, or under a URL from where each is fetched once and verified."""

import logging
import re
import time
from pathlib import Path
from typing import Final, Protocol

from serving.settings import ServingSettings
from vlm.errors import StoreError
from vlm.inference import cached_bundle, stored_bundles

__all__ = [
    "Shelf",
    "is_bundle_name",
    "is_fingerprint",
    "local_bundle",
    "open_shelf",
    "without_places",
]

_log = logging.getLogger(__name__)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FINGERPRINT: Final = re.compile(r"[0-9A-Fa-f]{64}")
_PLACE: Final = re.compile(
    r"""(?<![\w.~/-])(?:[A-Za-z][\w+.-]*://|~?/|\.{1,2}/)(?:[^\s'"(),:;]|:(?=\S))*"""
)
"""A path from the root, from home or from here, or a URL."""
_LOOK_SECONDS: Final = 30
BUNDLE_NAMES: Final = (
    "names are of 1 to 128 letters, digits, dots, hyphens and underscores, a letter or digit "
    "first, and not 64 hexadecimal digits, which are a fingerprint"
)


class Shelf(Protocol):
    """Bundles by name: a request can name nothing else. Methods block."""

    def names(self) -> list[str]:
        """What can be loaded, in order."""
        ...

    def folder(self, name: str) -> Path | None:
        """The folder of a bundle, fetched if need be; None if there is none of that name.

        Raises:
            BundleError: If what is there is no intact bundle.
            StoreError: If the store does not answer.
        """
        ...


def open_shelf(settings: ServingSettings) -> Shelf:
    """The shelf of `settings.models`; an empty one for none."""
    if isinstance(settings.models, str):
        return _RemoteShelf(settings.models, settings.bundle_cache.expanduser())
    return _LocalShelf(settings.models)


def local_bundle(settings: ServingSettings) -> Path:
    """The folder of the default bundle, fetched if it lies in an object store.

    Raises:
        BundleError: If no intact bundle is there.
        StoreError: If the store does not answer.
    """
    if isinstance(settings.bundle, str):
        return cached_bundle(settings.bundle, settings.bundle_cache.expanduser())
    return settings.bundle


def is_bundle_name(text: str) -> bool:
    """Whether a bundle or a model may be called that."""
    return _NAME.fullmatch(text) is not None and not is_fingerprint(text)


def is_fingerprint(text: str) -> bool:
    """Whether it looks like one: a request may name a model by it, so no other may answer to it."""
    return _FINGERPRINT.fullmatch(text) is not None


def without_places(text: str, settings: ServingSettings) -> str:
    """What is wrong with a bundle, for clients: no path or URL is left, but their last names."""
    beside = settings.bundle.parent if isinstance(settings.bundle, Path) else None
    known = (settings.models, settings.bundle_cache.expanduser(), settings.runtimes, beside)
    for place in known:  # these may be relative, or have spaces
        if place is not None:
            text = text.replace(f"{str(place).rstrip('/')}/", "")
    return _PLACE.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], text)


class _LocalShelf:
    def __init__(self, root: Path | None) -> None:
        self._root = root

    def names(self) -> list[str]:
        if self._root is None or not self._root.is_dir():
            return []
        there = (path.name for path in self._root.iterdir() if (path / "bundle.json").is_file())
        return sorted(name for name in there if is_bundle_name(name))

    def folder(self, name: str) -> Path | None:
        return self._root / name if self._root is not None and name in self.names() else None


class _RemoteShelf:
    """A list is asked for twice a minute at most; while the store is silent the last one holds."""

    def __init__(self, url: str, cache: Path) -> None:
        self._url = url.rstrip("/")
        self._cache = cache
        self._names: list[str] = []
        self._looked = float("-inf")

    def names(self) -> list[str]:
        if time.monotonic() > self._looked + _LOOK_SECONDS:
            try:
                self._look()
            except StoreError as error:
                _log.warning("bundles could not be listed", extra={"reason": str(error)})
                self._looked = time.monotonic()
        return self._names

    def folder(self, name: str) -> Path | None:
        if not is_bundle_name(name):
            return None
        if name not in self._names:
            self._look()
        return cached_bundle(f"{self._url}/{name}", self._cache) if name in self._names else None

    def _look(self) -> None:
        self._names = [name for name in stored_bundles(self._url) if is_bundle_name(name)]
        self._looked = time.monotonic()
