"""The command line: `vlm VERB`, one verb a file."""

from vlm.cli.main import main

__all__ = ["main"]
