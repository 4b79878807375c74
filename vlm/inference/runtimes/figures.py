"""What was measured of a runtime, and under which conditions it still counts."""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pydantic import Field, ValidationError

from vlm.config import Config
from vlm.files import write_text_whole
from vlm.inference.runtimes.parity import Parity
from vlm.inference.runtimes.protocol import RuntimeName

__all__ = ["Figures", "best_seconds", "processor", "read_figures", "store_figures"]

_SPEED_ROUNDS: Final = 3


class Figures(Config):
    """What is known of a runtime on this machine."""

    runtime: RuntimeName
    parity: Parity | None = None
    """None if it cannot run here."""
    images_per_second: float | None = None
    """In batches of 8, the model alone."""
    texts_per_second: float | None = None
    refused: str | None = None
    """Why it must not answer, or none."""
    conditions: str = Field("", repr=False)
    """Hash of machine, libraries and files: figures of other conditions do not count."""

    @property
    def seconds_per_pair(self) -> float:
        """An image and a text, for ranking."""
        if self.refused or not self.images_per_second or not self.texts_per_second:
            return float("inf")
        return 1 / self.images_per_second + 1 / self.texts_per_second


def read_figures(path: Path, *, conditions: str) -> Figures | None:
    """Stored figures, or none if they are missing, damaged or of other conditions."""
    try:
        figures = Figures.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
    return figures if figures.conditions == conditions else None


def store_figures(path: Path, figures: Figures) -> None:
    """Write them whole; a folder that is only read costs a measurement at each start, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_whole(path, figures.model_dump_json(indent=2) + "\n")
    except OSError:
        return


def best_seconds(run: Callable[[], object]) -> float:
    """The shortest of a few rounds: others on the machine only ever make one longer."""
    run()
    seconds = []
    for _ in range(_SPEED_ROUNDS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def processor() -> str:
    """The kind of processor, with its instruction sets where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})
    )
