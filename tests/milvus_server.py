"""A real Milvus server for tests: the all-in-one of the PyPI package `milvus`, kept to itself.

    python -m tests.milvus_server install            # once, into build/milvus
    python -m tests.milvus_server serve FOLDER KEY=VALUE …   # ends with its input

The server listens on every interface, on fixed ports. So it runs in a network namespace of its
own, where nothing else is: this process makes a socket on loopback outside, enters a new namespace,
starts the server there, and carries bytes between the two. Any number of them can run side by side.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import importlib
import lzma
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

__all__ = ["MilvusServer", "install", "milvus_server"]

VERSION: Final = "2.3.5"
PACKAGE: Final = Path(__file__).parents[1] / "build" / "milvus"
_START_SECONDS: Final = 120
_PORT: Final = 19530
_HEALTH: Final = "http://127.0.0.1:9091/healthz"
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_PR_SET_PDEATHSIG: Final = 1
_SETTINGS: Final = {
    # As serving/README.md asks: what is not indexed yet is compared exactly.
    "queryNode.segcore.interimIndex.enableIndex": "false",
    "log.level": "warn",
}
_TEST_SETTINGS: Final = {
    # So that the few items of a test get an index at all, and soon.
    "indexCoord.segment.minSegmentNumRowsToEnableIndex": "64",
    "rootCoord.minSegmentSizeToEnableIndex": "64",
    "queryCoord.checkInterval": "100",
    "queryCoord.checkHandoffInterval": "200",
    "queryCoord.distPullInterval": "50",
    "rootCoord.dmlChannelNum": "4",
}


class MilvusServer:
    """A server process, ready when this returns.

    Args:
        folder: Of its data; what another process left there is there again.
        production: Whether it is set up as by its makers, and not for the few items of a test.
        more: Further keys of its configuration.

    Raises:
        RuntimeError: If it cannot be started here; the message says why.
    """

    def __init__(
        self, folder: Path, *, production: bool = False, more: Mapping[str, str] | None = None
    ) -> None:
        settings = _SETTINGS | ({} if production else _TEST_SETTINGS) | dict(more or {})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.milvus_server", "serve", str(folder), *_listed(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        word, _, rest = self._process.stdout.readline().strip().partition(" ")
        if word != "ready":
            self.stop()
            raise RuntimeError(rest or "the server ended before it was ready")
        self.uri, self._pid = rest.split()

    @property
    def peak_mb(self) -> int:
        """The most memory that the server has had."""
        status = Path(f"/proc/{self._pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) // 1024

    def kill(self) -> None:
        """SIGKILL, to the server itself."""
        os.kill(int(self._pid), signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        """End the server and what carries its bytes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)


@contextlib.contextmanager
def milvus_server(
    folder: Path, *, production: bool = False, more: Mapping[str, str] | None = None
) -> Iterator[MilvusServer]:
    """A server for the time of a block."""
    server = MilvusServer(folder, production=production, more=more)
    try:
        yield server
    finally:
        server.stop()


def install() -> str | None:
    """Fetch and unpack the package, if that was not done yet; returns why it cannot be had."""
    PACKAGE.parent.mkdir(exist_ok=True)
    with (PACKAGE.parent / ".milvus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (PACKAGE / "unpacked").is_dir():
            return None
        draft = PACKAGE.with_name(".milvus.draft")
        shutil.rmtree(draft, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        command += ["--disable-pip-version-check", "--target", str(draft), f"milvus=={VERSION}"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return f"milvus=={VERSION} cannot be installed: {done.stderr.strip().splitlines()[-1:]}"
        (draft / "unpacked").mkdir()
        for packed in (draft / "milvus" / "data" / "bin").glob("*.lzma"):
            unpacked = draft / "unpacked" / packed.stem
            with lzma.open(packed) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target)
            unpacked.chmod(0o755)
            packed.unlink()
        shutil.rmtree(PACKAGE, ignore_errors=True)
        draft.replace(PACKAGE)
    return None


def serve(folder: Path, settings: Mapping[str, str]) -> None:
    """Run a server until the standard input ends."""
    outside = socket.create_server(("127.0.0.1", 0))
    try:
        _enter_network_namespace()
    except OSError as error:
        _say(f"refused no network namespace can be made here: {error}")
        return
    process = _started(folder, settings)
    try:
        if not _is_healthy(process):
            log = (folder / "logs" / "server.log").read_text(errors="replace")
            _say(f"refused the server did not become healthy: {log[-500:]!r}")
            return
        _say(f"ready http://127.0.0.1:{outside.getsockname()[1]} {process.pid}")
        asyncio.run(_carry(outside))
    finally:
        process.kill()
        process.wait()


def _enter_network_namespace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _CLONE_NEWNET if os.geteuid() == 0 else _CLONE_NEWNET | _CLONE_NEWUSER
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        name = struct.pack("16sh14x", b"lo", 0)
        _, known = struct.unpack("16sh14x", fcntl.ioctl(device, _SIOCGIFFLAGS, name))
        fcntl.ioctl(device, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", known | _IFF_UP))


def _started(folder: Path, settings: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    sys.path.append(str(PACKAGE))
    package = importlib.import_module("milvus")
    config = package.MilvusServerConfig(data_dir=str(folder))
    for key, value in settings.items():
        config.set(key, value)
    config.resolve()
    environment = {
        **os.environ,
        "DEPLOY_MODE": "STANDALONE",
        "MILVUS_RUN_DIR": str(folder / "run"),
        "LD_LIBRARY_PATH": str(PACKAGE / "unpacked"),
    }
    libc = ctypes.CDLL(None)
    with (folder / "logs" / "server.log").open("w") as log:
        return subprocess.Popen(
            [str(PACKAGE / "unpacked" / "milvus"), "run", "standalone"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # It must not outlive this process, however that ends.
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )


def _is_healthy(process: "subprocess.Popen[bytes]") -> bool:
    end = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(_HEALTH, timeout=5) as answer:
                if b"OK" in answer.read():
                    return True
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    return False


async def _carry(outside: socket.socket) -> None:
    """Connections from outside go to the server; until the standard input ends."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", _PORT)
            await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))
        writer.close()

    server = await asyncio.start_server(connected, sock=outside)
    async with server:
        await asyncio.to_thread(sys.stdin.read)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**18):
        writer.write(data)
        await writer.drain()
    writer.close()


def _listed(settings: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "install":
        problem = install()
        if problem:
            _say(problem)
    else:
        serve(Path(sys.argv[2]), dict(each.split("=", 1) for each in sys.argv[3:]))
