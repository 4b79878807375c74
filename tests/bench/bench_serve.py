"""Our server against others: same weights, machine and client, in turns: `make bench-serve`.

    python -m tests.bench.bench_serve --out serve.json [--part rates] [--part half] …

All servers hold one ViT-B/32 and answer OpenAI's embeddings request, one image (JPEG, 336 x 336) or
one text a request. Before anything is timed, their rows are compared.

(a) is what people write first: FastAPI, open_clip, its transform and tokenizer, no batching.
(b) is infinity-emb, where --infinity names an environment that has it.
(c) is ours with `torch-fp32`, with `openvino-fp32`, whose rows are equal to 1e-5, and with what
`runtime=auto` takes: the fastest that passes the parity gate.

| part | measures |
|---|---|
| `rates` | answers/s, p50 and p99 without a pause at 1, 8 and 32 at once, and peak memory |
| `costs` | the server at 32 against the same runtime in a loop without HTTP, in turns |
| `half` | latencies at half of the answers/s that `rates` found at 32, evenly and at random |
| `overload` | ten times those answers/s for --overload seconds: answered, refused, or lost |

Each part is put into the file of --out when it is done, and parts done before stay in it. The
client is threads of this process with kept connections, on the same cores as the servers, but for
what `costs` finds with them apart.
"""

import argparse
import base64
import gc
import io
import itertools
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import torch
from PIL import Image

from tests.bench.serve_cost import cost, loop_alone
from tests.bench.serve_models import save_fitted, save_transformers
from tests.bench.serve_servers import (
    Running,
    infinity_command,
    our_command,
    plain_command,
    server,
)
from vlm.cli.bench_load import Tally, image_bodies, load, pace, text_bodies
from vlm.inference import load_bundle
from vlm.inference.runtimes import (
    RuntimeName,
    default_cache,
    export_runtime,
    fastest_runtime,
    runtime_name,
)

CONCURRENCY: Final = (1, 8, 32)
MODALITIES: Final = ("images", "texts")
PLAIN: Final = "plain FastAPI + open_clip"
INFINITY: Final = "infinity-emb"
_MEANT: Final = 400
"""Requests at half load at least: of fewer, one pause of the machine is the p99."""
_STARTS: Final = itertools.count(0, 1_000_000)


def main() -> None:
    """Make what is missing, then each part asked for, printed and kept as JSON."""
    parts = {"rates": rates, "costs": costs, "half": half, "overload": overload}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench-serve.json"))
    parser.add_argument("--work", type=Path, default=Path("build/bench-serve"))
    parser.add_argument("--infinity", type=Path, help="python of an environment with infinity-emb")
    parser.add_argument("--part", choices=parts, action="append")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--overload", type=float, default=60)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        loop_alone(arguments.work, runtime_name(arguments.alone), bodies)
        return
    tree = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    tree["threads"] = torch.get_num_threads()
    tree["runtimes"] = runtimes = measured_runtimes(arguments.work)
    gc.collect()
    gc.freeze()  # a full collection of torch's objects is a pause of the client, not of a server
    names = list(dict.fromkeys(["torch-fp32", "openvino-fp32", runtimes[0]["runtime"]]))
    for part in arguments.part or parts:
        tree[part] = parts[part](arguments, names, tree)
        arguments.out.write_text(json.dumps(tree, indent=2) + "\n")
        sys.stdout.write(json.dumps({part: tree[part]}, indent=2) + "\n")


def measured_runtimes(work: Path) -> list[dict[str, Any]]:
    """Make the bundle and its runtimes; figures of all, the fastest that passes first."""
    if not (work / "bundle" / "bundle.json").is_file():
        save_fitted(work / "bundle")
    if not (work / "transformers" / "config.json").is_file():
        save_transformers(work / "bundle", work / "transformers")
    bundle, cache = load_bundle(work / "bundle"), default_cache(work / "bundle")
    fitted: tuple[RuntimeName, ...] = ("openvino-mixed", "openvino-int8")
    for name in fitted:
        if not list(cache.glob(f"*-{name}")):
            export_runtime(name, bundle, cache=cache)
    choice = fastest_runtime(bundle, cache=cache)
    return [figures.model_dump(exclude={"conditions"}) for figures in choice.figures]


def rates(
    arguments: argparse.Namespace, names: list[RuntimeName], tree: dict[str, Any]
) -> dict[str, Any]:
    """All servers in turns, in every round, at every concurrency, for both modalities."""
    bundle = arguments.work / "bundle"
    commands = {PLAIN: plain_command(bundle)}
    if arguments.infinity is not None:
        commands[INFINITY] = infinity_command(arguments.infinity, arguments.work / "transformers")
    commands |= {f"ours, {name}": our_command(bundle, name) for name in names}
    with ExitStack() as stack:
        running = {name: stack.enter_context(server(c)) for name, c in commands.items()}
        found: dict[str, Any] = {"equality": compared(running)}
        warm(running)
        tallies: dict[tuple[str, str, int], Tally] = {}
        for _, modality, at_once, name in itertools.product(
            range(arguments.rounds), MODALITIES, CONCURRENCY, running
        ):
            tally = tallies.setdefault((modality, name, at_once), Tally())
            load(running[name].url, bodies(modality), concurrency=at_once,
                 seconds=arguments.seconds, tally=tally)  # fmt: skip
        found["peak_mib"] = {name: process.peak_mib() for name, process in running.items()}
    for modality, name, at_once in tallies:
        by_name = {n: tallies[modality, n, at_once].figures() for n in running}
        found.setdefault(modality, {}).setdefault(name, {})[str(at_once)] = by_name[name] | {
            f"ratio_to_{short}": round(by_name[name]["per_second"] / by_name[n]["per_second"], 2)
            for n, short in ((PLAIN, "plain"), (INFINITY, "infinity"))
            if n in by_name
        }
    return found


def warm(running: dict[str, Running]) -> None:
    """A second of each modality at each server, which is not counted."""
    for process, modality in itertools.product(running.values(), MODALITIES):
        load(process.url, bodies(modality), concurrency=8, seconds=1, tally=Tally())


def compared(running: dict[str, Running]) -> dict[str, float]:
    """Largest difference of a number in rows from the plain server's, images as the model has them.

    Raises:
        SystemExit: If fp32 servers differ by more than 1e-4: then they serve other models.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((224, 224)).save(buffer, "PNG")
    image = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    asked = [(image, "image"), *((text, "text") for text in ("a red apple", "two dogs, a cat"))]
    rows = {
        name: np.array([_row(process.url, text, kind) for text, kind in asked])
        for name, process in running.items()
    }
    found = {name: float(np.abs(rows[name] - rows[PLAIN]).max()) for name in running}
    if any(d > 1e-4 for name, d in found.items() if not name.endswith(("int8", "bf16", "mixed"))):
        message = f"these servers do not serve one model: {found}"
        raise SystemExit(message)
    return found


def _row(url: str, text: str, modality: str) -> list[float]:
    body = {"input": text, "modality": modality}
    answer = httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).raise_for_status()
    row: list[float] = answer.json()["data"][0]["embedding"]
    return row


def costs(
    arguments: argparse.Namespace, names: list[RuntimeName], tree: dict[str, Any]
) -> dict[str, Any]:
    """See `serve_cost`."""
    return cost(arguments.work, names[1:], bodies, seconds=arguments.seconds)


def half(
    arguments: argparse.Namespace, names: list[RuntimeName], tree: dict[str, Any]
) -> dict[str, Any]:
    """Latencies of ours at half of its capacity, warm: a first batch of its size costs more.

    Of three turns the one whose p99 over p50 is the median: one in which the machine is slower than
    in the measurement of the capacity before is near to full load, not at half of it.
    """
    found: dict[str, Any] = {}
    for name in names[1:]:
        with server(our_command(arguments.work / "bundle", name)) as running:
            for modality in MODALITIES:
                for kind in ("even", "random"):
                    turns = [
                        _at_half(running.url, modality, kind == "even", arguments.seconds)
                        for _ in range(3)
                    ]
                    turns.sort(key=lambda figures: figures["p99_over_p50"])
                    found.setdefault(modality, {}).setdefault(name, {})[kind] = turns[1]
    return found


def _at_half(url: str, modality: str, even: bool, seconds: float) -> dict[str, float]:
    full = Tally()  # anew each time: the machine's rate moves by a third in minutes
    load(url, bodies(modality), concurrency=32, seconds=seconds, tally=full)
    rate = full.requests / full.seconds / 2
    for lasting in (seconds, max(4 * seconds, _MEANT / rate)):
        tally = Tally()
        pace(url, bodies(modality), rate=rate, even=even, most=64, seconds=lasting,
             tally=tally)  # fmt: skip
    figures = tally.figures()
    return {**figures, "p99_over_p50": round(figures["p99_ms"] / figures["p50_ms"], 2)}


def overload(
    arguments: argparse.Namespace, names: list[RuntimeName], tree: dict[str, Any]
) -> dict[str, Any]:
    """Ten times the capacity: what is accepted is answered, what is not is told so at once.

    A lost connection, or any answer but 200 and 503 with a Retry-After, ends the run as an error.
    """
    name = names[-1]
    capacity = tree["rates"]["images"][f"ours, {name}"]["32"]["per_second"]
    tally = Tally()
    command = our_command(arguments.work / "bundle", name, "max_waiting=64")
    with server(command) as running:
        begin = time.perf_counter()
        pace(running.url, bodies("images"), rate=10 * capacity, seconds=arguments.overload,
             tally=tally)  # fmt: skip
        spent = time.perf_counter() - begin
        ready = httpx.get(f"{running.url}/readyz", timeout=30).status_code
        peak = running.peak_mib()
    asked = tally.requests + tally.refused
    return {"runtime": name, "wanted_per_second": 10 * capacity, "seconds": round(spent, 1),
            "asked_per_second": round(asked / spent, 1), "answered": tally.requests,
            "refused": tally.refused, "lost": 0, **tally.figures(), "ready_after": ready,
            "peak_mib": peak}  # fmt: skip


def bodies(modality: str) -> Callable[[int], bytes]:
    """Bodies that no server has seen in an earlier run, so that no cache answers."""
    make, start = image_bodies() if modality == "images" else text_bodies(), next(_STARTS)
    return lambda number: make(start + number)


if __name__ == "__main__":
    main()
