"""Ranks that are killed and come back in another number see the batches of an undisturbed run."""

import json
import os
import signal
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tests.support import drawn_samples, train_stream
from vlm.data.manifest import build_manifest, open_manifest
from vlm.data.reader import Reader
from vlm.data.samples import Sample
from vlm.data.stream import StreamConfig, TrainStream
from vlm.data.write import write_shards
from vlm.distributed import World, gather_rows

STEPS = 160
RUN_LENGTH = 4


def stream(folder: Path, *, rank: int, size: int, threads: int) -> TrainStream:
    config = StreamConfig.model_validate(
        {
            "threads": threads,
            "max_bad_fraction": 0.2,
            "captions": {"text": 0.4, "tags": 0.6},
        }
    )
    return train_stream(
        Reader(open_manifest(folder), run_length=RUN_LENGTH),
        config,
        seed=11,
        run_length=RUN_LENGTH,
        image_size=8,
        rank=rank,
        size=size,
    )


def rank_process(
    rank: int, size: int, store: str, folder: Path, log: Path, start: int, threads: int
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    world = World(rank=rank, size=size)
    batches = stream(folder, rank=rank, size=size, threads=threads).batches(start, STEPS)
    with log.open("a") as file:
        for step, batch in enumerate(batches, start=start):
            both = torch.cat([batch.sample_ids[:, None], batch.token_ids], dim=1)
            gathered = gather_rows(both, world)
            if rank == 0:
                file.write(json.dumps({"step": step, "rows": gathered.tolist()}) + "\n")
                file.flush()
            time.sleep(0.005)
    dist.destroy_process_group()


def lines(log: Path) -> list[str]:
    """Complete lines; a kill may tear the last."""
    return log.read_text().split("\n")[:-1] if log.is_file() else []


def run_until(
    folder: Path, log: Path, *, size: int, start: int, threads: int, kill_after: int | None
) -> None:
    """Run ranks from `start`; SIGKILL them all once that many lines are written."""
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = (size, f"{scratch}/store", folder, log, start, threads)
        ranks = [context.Process(target=rank_process, args=(r, *arguments)) for r in range(size)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + 240
        while kill_after is not None and len(lines(log)) < kill_after:
            assert time.monotonic() < deadline, "the ranks made no progress"
            assert all(process.is_alive() for process in ranks), "a rank ended by itself"
            time.sleep(0.01)
        for process in ranks:
            if kill_after is not None and process.pid is not None:
                os.kill(process.pid, signal.SIGKILL)
            process.join(240)
        expected = 0 if kill_after is None else -signal.SIGKILL
        assert [process.exitcode for process in ranks] == [expected] * size


def test_kill_and_resume_on_four_then_two_then_three_ranks_repeats_the_undisturbed_run(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "data"
    samples = drawn_samples(95)
    for number in (7, 40, 41):
        samples[number] = Sample(
            key=f"bad{number}", image=b"\xff\xd8\xff broken", text="bad", metadata={"tags": ["b"]}
        )
    write_shards(samples, folder, prefix="p", samples_per_shard=17)  # shards of unequal length
    build_manifest(folder)

    generator = np.random.default_rng(time.time_ns())  # any step will do
    start = 0
    resumed: dict[int, list[list[int]]] = {}
    for number, (size, threads) in enumerate([(4, 1), (2, 3), (3, 2)]):
        log = tmp_path / f"log-{number}.jsonl"
        last = number == 2
        kill_after = None if last else int(generator.integers(20, 60))
        run_until(folder, log, size=size, start=start, threads=threads, kill_after=kill_after)
        entries = [json.loads(line) for line in lines(log)]
        assert entries[0]["step"] == start
        for entry in entries:
            # Steps after the last checkpoint are done twice, with the same rows.
            assert resumed.setdefault(entry["step"], entry["rows"]) == entry["rows"]
        # As if the last checkpoint had been some steps before the kill.
        start = max(start, entries[-1]["step"] + 1 - int(generator.integers(0, 10)))

    undisturbed = stream(folder, rank=0, size=1, threads=1).batches(0, STEPS)
    for step, batch in enumerate(undisturbed):
        whole = torch.cat([batch.sample_ids[:, None], batch.token_ids], dim=1)
        assert resumed[step] == whole.tolist(), f"step {step} differs"
    assert len(resumed) == STEPS
