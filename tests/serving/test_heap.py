"""Collections walk what is new, and what was replaced is freed."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from serving.app import create_app
from serving.settings import ServingSettings

SCRIPT = """
import gc, weakref
from serving.heap import settle_heap
class Ring:
    def __init__(self): self.me = self
kept = Ring()
gone = weakref.ref(kept)
settle_heap()
assert gc.get_freeze_count() > 1000
kept = None
gc.collect()
assert gone() is not None  # left out of collections until the next settling
settle_heap()
assert gone() is None
young = Ring()
gone, young = weakref.ref(young), None
gc.collect()
assert gone() is None
"""


def test_what_lives_is_left_out_and_what_was_dropped_is_freed_at_the_next_settling() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)


FREED = """
from serving.heap import settle_heap
def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096
blocks = [bytearray(100_000) for _ in range(3000)]  # each under what is mapped on its own
last = bytearray(100_000)  # above them, so that nothing is given back by itself
full = resident()
blocks.clear()
kept = resident()
settle_heap()
assert full - kept < 100e6, (full, kept)
assert kept - resident() > 200e6, (kept, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked to give memory back")
def test_what_a_model_took_is_given_back_when_it_has_gone() -> None:
    subprocess.run([sys.executable, "-c", FREED], check=True, timeout=120)


def test_the_server_settles_when_it_is_ready_and_after_a_model_was_replaced(
    bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "other").symlink_to(bundle)
    settings = ServingSettings(
        bundle=bundle,
        index=tmp_path / "index",
        models=str(tmp_path / "models"),
        request_seconds=0.2,
    )
    settled: list[int] = []
    with TestClient(
        create_app(settings, settle=lambda: settled.append(1)), base_url="http://localhost"
    ) as client:
        assert len(settled) == 1
        assert client.post("/v1/models/other/load", json={}).status_code == 200
        client.portal.call(_pause)  # type: ignore[union-attr] # it is there inside the with
        assert len(settled) == 2


async def _pause() -> None:
    await asyncio.sleep(0.5)
