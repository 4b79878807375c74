"""Our server against a plain one: same weights, machine and client, in turns: `make bench-serve`.

    python -m tests.bench.bench_serve --out serve.json

All servers hold one ViT-B/32 and answer OpenAI's embeddings request, one image or text a request.
(a) is what people write first: FastAPI, open_clip, its transform and tokenizer, no batching.
(b) is infinity-emb, where --infinity names an environment that has it.
(c) is ours with `torch-fp32` and with `openvino-fp32`, whose rows are equal to 1e-5, and with what
`runtime=auto` takes where that is another. The client is a process of threads with kept
connections.

The weights are random, and where nothing was learnt the best text of an image wins by a hair: the
parity gate is at its strictest, and bf16 and int8 fail it here though their cosines pass. What they
do alone, in batches of 8, is under `runtimes`.
Rates are the sum over rounds; latencies are of all requests of all rounds.
"""

import argparse
import base64
import io
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlm.cli.bench_serve import Tally, image_bodies, load, text_bodies
from vlm.inference import load_bundle, save_bundle
from vlm.inference.runtimes import export_runtime, fastest_runtime
from vlm.models import DualEncoder, DualEncoderConfig
from vlm.preprocess import ImageConfig, TokenizerConfig

CONCURRENCY = (1, 8, 32)
MODALITIES = ("images", "texts")
PLAIN = "plain FastAPI + open_clip"
B32 = {
    "dim": 512,
    "image": {"type": "vit", "width": 768, "layers": 12, "head_width": 64, "patch_size": 32},
    "text": {"type": "transformer", "width": 512, "layers": 12, "heads": 8},
}


def main() -> None:
    """Make the bundle, start the servers, measure in turns, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="kept folder of the bundle and its runtimes")
    parser.add_argument("--infinity", type=Path, help="python of an environment with infinity-emb")
    parser.add_argument("--infinity-model", type=Path, help="the model's folder, as transformers'")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        bundle, runtimes = work / "bundle", measured_runtimes(work)
        fastest = runtimes[0]["runtime"]
        with ExitStack() as stack:
            urls = {PLAIN: stack.enter_context(server(plain_command(bundle)))}
            if arguments.infinity is not None:
                command = infinity_command(arguments.infinity, arguments.infinity_model)
                urls["infinity-emb"] = stack.enter_context(server(command))
            for name in dict.fromkeys(["torch-fp32", "openvino-fp32", fastest]):
                url = stack.enter_context(server(our_command(bundle, name)))
                urls[f"ours, {name}"] = url
            tallies = measure(urls, seconds=arguments.seconds, rounds=arguments.rounds)
    text = json.dumps(report(tallies, runtimes), indent=2)
    sys.stdout.write(text + "\n")
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


def report(tallies: dict[tuple[str, str, int], Tally], runtimes: list[Any]) -> dict[str, Any]:
    """Figures of every server, and ours divided by the plain one's."""
    tree: dict[str, Any] = {"threads": torch.get_num_threads(), "runtimes": runtimes}
    for (name, modality, concurrency), tally in tallies.items():
        figures: dict[str, Any] = tally.figures()
        plain = tallies[PLAIN, modality, concurrency].figures()["per_second"]
        figures["ratio_to_plain"] = round(figures["per_second"] / plain, 2)
        tree.setdefault(modality, {}).setdefault(name, {})[str(concurrency)] = figures
    return tree


def measured_runtimes(work: Path) -> list[dict[str, Any]]:
    """Make the bundle and its runtimes, int8 too; figures of all, the fastest that passes first."""
    if not (work / "bundle" / "bundle.json").is_file():
        save_random(work / "bundle")
    bundle = load_bundle(work / "bundle")
    if not list((work / "runtimes").glob("*-openvino-int8")):
        export_runtime("openvino-int8", bundle, cache=work / "runtimes")
    choice = fastest_runtime(bundle, cache=work / "runtimes")
    return [figures.model_dump(exclude={"conditions"}) for figures in choice.figures]


def save_random(folder: Path) -> None:
    """A ViT-B/32 as it is before training: no matter for the time that a batch takes."""
    torch.manual_seed(0)
    config = DualEncoderConfig.model_validate(B32)
    open_clip_config = config.open_clip_config(image_size=224, context_length=77)
    save_bundle(
        folder,
        DualEncoder(open_clip_config),
        name="b32",
        open_clip_config=open_clip_config,
        image=ImageConfig(),
        tokenizer=TokenizerConfig(),
    )


def measure(
    urls: dict[str, str], *, seconds: float, rounds: int
) -> dict[tuple[str, str, int], Tally]:
    """All servers in turns, in every round, at every concurrency, for both modalities."""
    bodies = {"images": image_bodies(), "texts": text_bodies()}
    tallies: dict[tuple[str, str, int], Tally] = {}
    for number in range(rounds + 1):
        for modality in MODALITIES:
            for concurrency in CONCURRENCY if number else (8,):  # the first only warms up
                for name, url in urls.items():
                    tally = tallies.setdefault((name, modality, concurrency), Tally())
                    make = partial(later, bodies[modality], next(_STARTS))
                    taken = seconds if number else 1
                    load(url, make, concurrency=concurrency, seconds=taken, tally=tally)
                    if not number:
                        del tallies[name, modality, concurrency]
    return tallies


def later(make: Callable[[int], bytes], start: int, number: int) -> bytes:
    """Bodies that no server has seen in an earlier run, so that no cache answers."""
    return make(start + number)


_STARTS = itertools.count(0, 1_000_000)


@contextmanager
def server(command: list[str]) -> Iterator[str]:
    """A process on a free port of loopback; its address."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if "running on http" in line:
                break
        else:
            message = "a server did not start:\n" + "".join(lines)
            raise SystemExit(message)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield lines[-1].split("running on ")[1].split()[0]
    finally:
        process.terminate()
        process.wait(30)


def plain_command(bundle: Path) -> list[str]:
    """The process of `serve_plain`."""
    code = f"from tests.bench.bench_serve import serve_plain; serve_plain({str(bundle)!r})"
    return [sys.executable, "-c", code]


def infinity_command(python: Path, model: Path) -> list[str]:
    """infinity-emb with a local folder; its routes under `/v1`, as ours are.

    A torchvision that was built for CUDA needs `vlm/torchvision_shim.py` in that environment.
    """
    code = (
        "import importlib.util as u\n"
        "if u.find_spec('torchvision_shim'):\n"
        "    import torchvision_shim; torchvision_shim.install()\n"
        "from infinity_emb.cli import cli; cli()"
    )
    options = {
        "--model-id": str(model), "--engine": "torch", "--device": "cpu", "--url-prefix": "/v1",
        "--host": "127.0.0.1", "--port": str(free_port()),
    }  # fmt: skip
    words = [word for pair in options.items() for word in pair]
    return [str(python), "-c", code, "v2", *words, "--no-bettertransformer", "--no-model-warmup"]


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def our_command(bundle: Path, runtime: str) -> list[str]:
    """The process of our server, with a collection of its own."""
    index = bundle.parent / f"index-{runtime}"
    settings = [f"bundle={bundle}", f"index={index}", f"runtime={runtime}", "port=0"]
    return [sys.executable, "-m", "serving", *settings]


def serve_plain(bundle: str) -> None:
    """What people write first."""
    import fastapi
    import open_clip
    import uvicorn

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{bundle}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{bundle}")
    model.eval()
    app = fastapi.FastAPI()

    @app.post("/v1/embeddings")
    def embed(body: dict[str, Any]) -> dict[str, Any]:
        text = body["input"]
        with torch.inference_mode():
            if text.startswith("data:image/"):
                data = base64.b64decode(text.partition(",")[2])
                pixels = transform(Image.open(io.BytesIO(data)).convert("RGB"))
                rows = model.encode_image(pixels[None], normalize=True)
            else:
                rows = model.encode_text(tokenize([text]), normalize=True)
        return {"data": [{"embedding": rows[0].tolist(), "index": 0}]}

    uvicorn.run(app, port=0, access_log=False)


if __name__ == "__main__":
    main()
