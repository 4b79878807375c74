"""What HTTP, queues and decoding beside them cost, of the same runtime in a loop without any.

Both are processes that stay up, and they work in turns, a few seconds each: the machine's rate
moves more in minutes than what is looked for. Quoted are medians over the turns, and of the ratios
within them. The loop runs twice: a batch of 32 after the other, as one writes it, and in as many
threads as the server has streams, with 16 each where there are two.
"""

import base64
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from serving.settings import ServingSettings
from tests.bench.serve_servers import our_command, server
from vlm.cli.bench_load import Tally, load
from vlm.inference import Encoder, load_bundle
from vlm.inference.runtimes import RuntimeName, default_cache, gated_runtime
from vlm.preprocess import decode_image

__all__ = ["cost", "loop_alone"]

Bodies = Callable[[str], Callable[[int], bytes]]
_TURNS = 6


def cost(
    work: Path, names: list[RuntimeName], bodies: Bodies, *, seconds: float
) -> dict[str, dict[str, Any]]:
    """For each runtime and modality, on all cores and with one for the model and HTTP.

    `shared`: server, loop and the client use the same cores. `apart`: server and loop have one
    core, the client another.

    Returns:
        Answers/s of the loops and the server, the share of each loop's that is lost, and CPU
        milliseconds an item of either process.
    """
    cores = sorted(os.sched_getaffinity(0))
    found: dict[str, dict[str, Any]] = {}
    for arrangement, own, clients in (("shared", cores, cores), ("apart", cores[:1], cores[1:])):
        pinned = ["env", f"OMP_NUM_THREADS={len(own)}", "taskset", "-c", ",".join(map(str, own))]
        for name in names:
            command = [*pinned, *our_command(work / "bundle", name)]
            with server(command) as running, _loop([*pinned, *_loop_command(work, name)]) as ask:
                os.sched_setaffinity(0, clients)
                try:
                    for modality in ("images", "texts"):
                        make = bodies(modality)
                        load(running.url, make, concurrency=8, seconds=1, tally=Tally())
                        turns = [
                            _turn(running.process.pid, running.url, ask, bodies, modality, seconds)
                            for _ in range(_TURNS)
                        ]
                        by_name = found.setdefault(arrangement, {}).setdefault(modality, {})
                        by_name[name] = _medians(turns)
                finally:
                    os.sched_setaffinity(0, cores)
    return found


def loop_alone(work: Path, name: RuntimeName, bodies: Bodies) -> None:
    """Answer each line of standard input, `images 3`, with what a loop did for so many seconds."""
    bundle = load_bundle(work / "bundle")
    cache, most = default_cache(work / "bundle"), ServingSettings().streams_here
    encoders = {
        streams: Encoder(
            bundle, runtime=gated_runtime(name, bundle, cache=cache, streams=streams).runtime
        )
        for streams in sorted({1, most})
    }
    for line in sys.stdin:
        modality, seconds = line.split()
        figures: dict[str, float] = {}
        for key, encoder in (("", encoders[1]), ("streams_", encoders[most])):
            rate, cpu_ms = _looped(encoder, modality, bodies(modality), float(seconds))
            figures |= {f"{key}per_second": rate, f"{key}cpu_ms": cpu_ms}
        sys.stdout.write(json.dumps(figures) + "\n")
        sys.stdout.flush()


def _looped(
    encoder: Encoder, modality: str, make: Callable[[int], bytes], seconds: float
) -> tuple[float, float]:
    """Items/s, and CPU milliseconds an item."""
    size = 32 // encoder.streams
    start, spent = time.perf_counter(), time.process_time()

    def work(_: int) -> int:
        count = 0
        while time.perf_counter() - start < seconds:
            inputs = [json.loads(make(count + n))["input"] for n in range(size)]
            count += len(_rows(encoder, modality, inputs))
        return count

    with ThreadPoolExecutor(encoder.streams) as pool:
        count = sum(pool.map(work, range(encoder.streams)))
    taken, spent = time.perf_counter() - start, time.process_time() - spent
    return count / taken, 1000 * spent / count


def _rows(encoder: Encoder, modality: str, inputs: list[str]) -> np.ndarray:
    if modality == "texts":
        return encoder.encode_texts(inputs)
    files = [base64.b64decode(text.partition(",")[2]) for text in inputs]
    return encoder.encode_images([decode_image(file) for file in files])


def _loop_command(work: Path, name: RuntimeName) -> list[str]:
    return [sys.executable, "-m", "tests.bench.bench_serve", "--alone", name, "--work", str(work)]


@contextmanager
def _loop(command: list[str]) -> Iterator[Callable[[str, float], dict[str, float]]]:
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines, answers = process.stdin, process.stdout

        def ask(modality: str, seconds: float) -> dict[str, float]:
            lines.write(f"{modality} {seconds}\n")
            lines.flush()
            figures: dict[str, float] = json.loads(answers.readline())
            return figures

        for modality in ("images", "texts"):
            ask(modality, 1)
        yield ask


def _turn(
    pid: int,
    url: str,
    ask: Callable[[str, float], dict[str, float]],
    bodies: Bodies,
    modality: str,
    seconds: float,
) -> dict[str, float]:
    alone = ask(modality, seconds)
    process, tally = psutil.Process(pid), Tally()
    before = process.cpu_times()
    load(url, bodies(modality), concurrency=32, seconds=seconds, tally=tally)
    after = process.cpu_times()
    spent = after.user + after.system - before.user - before.system
    served, cpu_ms = tally.requests / tally.seconds, 1000 * spent / tally.requests
    return {
        "loop": alone["per_second"],
        "loop_streams": alone["streams_per_second"],
        "served": served,
        "cost": 1 - served / alone["per_second"],
        "cost_of_streams": 1 - served / alone["streams_per_second"],
        "loop_cpu_ms": alone["cpu_ms"],
        "loop_streams_cpu_ms": alone["streams_cpu_ms"],
        "server_cpu_ms": cpu_ms,
        "cpu_cost": cpu_ms / alone["streams_cpu_ms"] - 1,
    }


def _medians(turns: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(turn[name] for turn in turns), 3) for name in turns[0]}
