"""`python -m serving --bundle B --index I [key=value …]`: settings from file, flags, overrides."""

import argparse
import functools
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from serving.heap import settle_heap
from serving.logs import configure_logging
from serving.places import claim_place
from serving.protocol import HeadTimeoutProtocol
from serving.settings import (
    ServingSettings,
    hand_to_workers,
    load_settings,
    settings_folder,
)
from vlm.errors import VlmError
from vlm.openmp import let_idle_threads_sleep

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["main", "run", "worker_app"]

_FLAGS = ("bundle", "index", "host", "port")


def run(settings: ServingSettings) -> None:
    """Serve until SIGTERM or Ctrl-C; requests in flight are finished first."""
    let_idle_threads_sleep()
    configure_logging(settings.log_format)
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "timeout_graceful_shutdown": settings.drain_seconds,
        "server_header": False,
        # Not httptools: it bounds no headers, and drops a body that comes with `upgrade: h2c`, as
        # Java's client offers by itself.
        "http": functools.partial(HeadTimeoutProtocol, head_seconds=settings.head_seconds),
        "access_log": False,
        "log_config": None,
    }
    if settings.processes == 1:
        from serving.app import create_app  # noqa: PLC0415 - torch reads the thread policy at import

        uvicorn.run(create_app(settings.on_device(0), settle=settle_heap), **options)
        return
    with tempfile.TemporaryDirectory() as folder:
        hand_to_workers(settings, Path(folder))
        application = "serving.__main__:worker_app"
        uvicorn.run(application, factory=True, workers=settings.processes, **options)


def worker_app() -> "FastAPI":
    """The application of one of several processes, with the settings that `run` has left."""
    let_idle_threads_sleep()
    from serving.app import create_app  # noqa: PLC0415 - torch reads the thread policy at import

    settings = load_settings([])
    settings = settings.on_device(claim_place(settings_folder(), settings.processes))
    configure_logging(settings.log_format)
    return create_app(settings, settle=settle_heap)


def main() -> None:
    """Settings errors are told without a traceback."""
    try:
        settings = load_settings(_overrides(sys.argv[1:]))
    except VlmError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    run(settings)


def _overrides(arguments: list[str]) -> list[str]:
    """The few settings that everybody gives have flags; flags and overrides say the same."""
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    for name in _FLAGS:
        parser.add_argument(f"--{name}")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args(arguments)
    flags = {name: getattr(parsed, name) for name in _FLAGS}
    return [f"{k}={v}" for k, v in flags.items() if v is not None] + parsed.overrides


if __name__ == "__main__":
    main()
