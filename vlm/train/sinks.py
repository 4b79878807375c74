"""Where figures go beside the terminal: a file always, other places if asked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from vlm.config import Config
from vlm.errors import ConfigError

__all__ = ["ProfileConfig", "Sink", "TelemetryConfig", "WandbConfig", "open_sinks"]


class WandbConfig(Config):
    """Weights & Biases; `pip install wandb`."""

    project: str
    mode: Literal["online", "offline"] = "online"
    """`offline` writes into the run folder, for `wandb sync` later."""


class ProfileConfig(Config):
    """A window of steps to trace."""

    from_step: int = Field(10, ge=1)
    """The first traced step of this start of the run, counted from its beginning."""
    steps: int = Field(3, ge=1)


class TelemetryConfig(Config):
    """What a run tells beside its lines and `metrics.jsonl`."""

    tensorboard: bool = False
    """Event files in the run folder; `pip install tensorboard`."""
    wandb: WandbConfig | None = None
    page_every_seconds: float = Field(30.0, ge=0)
    """Least time between two drafts of `report.html`."""
    peak_tflops: float | None = Field(None, gt=0)
    """What a device can do, in 10^12 FLOP/s; known for common GPUs. MFU is told where it is."""
    profile: ProfileConfig | None = None
    """Write `trace-rankN.json`, to be opened in Perfetto or chrome://tracing."""


@runtime_checkable
class Sink(Protocol):
    """Takes one record after another."""

    def write(self, record: Mapping[str, float | int]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: one object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, record: Mapping[str, float | int]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files under `folder`."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional extra
        except ImportError as error:
            message = (
                "telemetry.tensorboard=true needs the package tensorboard: pip install "
                "tensorboard, or leave it false; metrics.jsonl is written in any case"
            )
            raise ConfigError(message) from error
        self._writer = SummaryWriter(str(folder))

    def write(self, record: Mapping[str, float | int]) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(record["step"]))

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A Weights & Biases run of the folder's name, continued on resume."""

    def __init__(self, config: WandbConfig, folder: Path, settings: dict[str, Any]) -> None:
        try:
            import wandb  # type: ignore[import-not-found,unused-ignore] # noqa: PLC0415 - optional
        except ImportError as error:
            message = (
                "telemetry.wandb needs the package wandb: pip install wandb, or leave the section "
                "out; metrics.jsonl is written in any case"
            )
            raise ConfigError(message) from error
        self._run = wandb.init(
            project=config.project,
            mode=config.mode,
            name=folder.name,
            id=folder.name,
            resume="allow",
            dir=str(folder),
            config=settings,
        )

    def write(self, record: Mapping[str, float | int]) -> None:
        self._run.log(dict(record), step=int(record["step"]))

    def close(self) -> None:
        self._run.finish()


def open_sinks(config: TelemetryConfig, folder: Path, settings: dict[str, Any]) -> list[Sink]:
    """All that are asked for, the file first; `settings` is the run's whole configuration.

    Raises:
        ConfigError: If a package that is asked for is not installed.
    """
    sinks: list[Sink] = [JsonLines(folder / "metrics.jsonl")]
    if config.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard"))
    if config.wandb is not None:
        sinks.append(Wandb(config.wandb, folder, settings))
    return sinks
