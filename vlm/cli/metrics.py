"""`vlm metrics`: a run's figures for Prometheus."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.console import Console

from vlm.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client.metrics_core import GaugeMetricFamily

__all__ = ["RunFigures", "metrics"]

_PREFIX = "vlm_train_"
_TAIL_BYTES = 65_536


class RunFigures:
    """A collector for Prometheus: the last record of a run, read anew at every scrape.

    Every number of `metrics.jsonl` is a gauge `vlm_train_KEY`; `vlm_train_record_age_seconds` says
    how old it is. A run that has not begun has no figures.
    """

    def __init__(self, run: Path) -> None:
        self._run = run

    def collect(self) -> "Iterator[GaugeMetricFamily]":
        from prometheus_client.metrics_core import (  # noqa: PLC0415 - `serve` extra
            GaugeMetricFamily,
        )

        path = self._run / "metrics.jsonl"
        record, written = _last_record(path)
        if record is None:
            return
        figures = {key: value for key, value in record.items() if isinstance(value, int | float)}
        figures["record_age_seconds"] = max(time.time() - written, 0.0)
        for key, value in figures.items():
            family = GaugeMetricFamily(
                _PREFIX + key, f"{key} of the last record in metrics.jsonl", labels=["run"]
            )
            family.add_metric([self._run.name], float(value))
            yield family


def metrics(
    run: Annotated[
        Path, typer.Argument(help="A run folder, which may not be there yet, or a training YAML.")
    ],
    port: Annotated[int, typer.Option(min=1, max=65535)] = 9401,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
) -> None:
    """Serve the figures of RUN to Prometheus until Ctrl-C or SIGTERM."""
    from prometheus_client import (  # noqa: PLC0415 - `serve` extra
        CollectorRegistry,
        start_http_server,
    )

    run = _folder(run)
    registry = CollectorRegistry()
    registry.register(RunFigures(run))
    _, thread = start_http_server(port, addr=host, registry=registry)
    Console(soft_wrap=True).print(f"figures of {run} at http://{host}:{port}", highlight=False)
    thread.join()


def _folder(path: Path) -> Path:
    """A run's folder, or that of the run in a YAML file; torch is not loaded for it."""
    if path.suffix not in {".yaml", ".yml"}:
        return path
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Path(tree["output"]) / tree["name"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        message = f"{path}: not a training YAML with `output` and `name`: {error!r}"
        raise ConfigError(message) from error


def _last_record(path: Path) -> tuple[dict[str, object] | None, float]:
    """The last whole record of a file that somebody appends to, and when that was."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - _TAIL_BYTES, 0))
            lines = file.read().split(b"\n")
        written = path.stat().st_mtime
    except OSError:
        return None, 0.0
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the one being written, or none
        if isinstance(record, dict):
            return record, written
    return None, 0.0
