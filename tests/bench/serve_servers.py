"""The servers that `bench_serve` compares, each a process on a free port of loopback."""

import base64
import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

__all__ = ["Running", "infinity_command", "our_command", "plain_command", "server"]


class Running:
    """A server, and its memory."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self.process = process
        self.url = url

    def peak_mib(self) -> int:
        """Most memory that the process has held, in MiB; 0 where /proc does not tell."""
        status = Path(f"/proc/{self.process.pid}/status")
        lines = status.read_text().splitlines() if status.is_file() else []
        return sum(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


@contextmanager
def server(command: list[str]) -> Iterator[Running]:
    """A process that tells its address as uvicorn does."""
    quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {**os.environ, **quiet}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
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
        yield Running(process, lines[-1].split("running on ")[1].split()[0])
    finally:
        process.terminate()
        process.wait(30)


def plain_command(bundle: Path) -> list[str]:
    """The process of `serve_plain`."""
    code = f"from tests.bench.serve_servers import serve_plain; serve_plain({str(bundle)!r})"
    return [sys.executable, "-c", code]


def infinity_command(python: Path, model: Path) -> list[str]:
    """infinity-emb with a local folder; its routes under `/v1`, as ours are.

    Its switch to BetterTransformer needs a torch that is long gone; transformers takes torch's
    fused attention by itself. The shim is for a torchvision that was built for CUDA. Requests are
    not logged, as with the others.
    """
    shim = Path(__file__).parents[2] / "vlm" / "torchvision_shim.py"
    code = (
        "import importlib.util as u, logging\n"
        "logging.getLogger('uvicorn.access').addFilter(lambda record: False)\n"
        f"spec = u.spec_from_file_location('torchvision_shim', {str(shim)!r})\n"
        "shim = u.module_from_spec(spec); spec.loader.exec_module(shim); shim.install()\n"
        "from infinity_emb.cli import cli; cli()"
    )
    options = {
        "--model-id": str(model), "--engine": "torch", "--device": "cpu", "--url-prefix": "/v1",
        "--host": "127.0.0.1", "--port": str(free_port()),
    }  # fmt: skip
    words = [word for pair in options.items() for word in pair]
    switches = ["--no-bettertransformer", "--no-model-warmup"]
    return [str(python.absolute()), "-c", code, "v2", *words, *switches]


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def our_command(bundle: Path, runtime: str, *settings: str) -> list[str]:
    """The process of our server, with a collection of its own."""
    index = bundle.parent / f"index-{runtime}"
    given = [f"bundle={bundle}", f"index={index}", f"runtime={runtime}", "port=0", *settings]
    return [sys.executable, "-m", "serving", *given]


def serve_plain(bundle: str) -> None:
    """What people write first."""
    from vlm.torchvision_shim import install

    install()  # this process knows nothing else of ours
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
