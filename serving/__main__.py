"""`python -m serving [key=value …]`: run the server with settings from file and overrides."""

import logging
import sys

import uvicorn

from serving.app import create_app
from serving.settings import ServingSettings, load_settings
from vlm.errors import VlmError

__all__ = ["main", "run"]


def run(settings: ServingSettings) -> None:
    """Serve until SIGTERM or Ctrl-C; requests in flight are finished first."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=settings.drain_seconds,
        server_header=False,
        access_log=False,
    )


def main() -> None:
    """Settings errors are told without a traceback."""
    try:
        settings = load_settings(sys.argv[1:])
    except VlmError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    run(settings)


if __name__ == "__main__":
    main()
