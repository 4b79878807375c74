"""Images a second from shards to batches, against open_clip's own pipeline: `make bench-data`.

    python -m tests.bench.bench_data --photos FOLDER --out data.json

Both read the same shards of JPEG photographs on the same two cores, resize to the same size with
the same transform (open_clip's evaluation transform; ours is compared with it pixel by pixel), and
tokenize the captions. open_clip's is `open_clip_train.data.get_wds_dataset` itself, with two worker
processes; ours is `TrainStream` with two threads. Each side runs in a process of its own; memory is
the sum of proportional set sizes of that process and its children, at its highest.

The photographs are crops, seeded, of whatever photographs FOLDER has.
"""

import argparse
import importlib.machinery
import io
import json
import multiprocessing
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import vlm  # noqa: F401 - mends torchvision before open_clip imports it
from tests.support import only
from vlm.data.manifest import build_manifest, open_manifest
from vlm.data.plan import Plan
from vlm.data.reader import Reader
from vlm.data.samples import Sample
from vlm.data.stream import Source, StreamConfig, TrainStream
from vlm.data.write import write_shards
from vlm.preprocess import (
    ImageConfig,
    TokenizerConfig,
    build_tokenizer,
    decode_image,
    normalise_images,
    prepare_image,
    resize_image,
    stack_images,
)

WORKERS = 2
BATCH = 64
SIZE = 224
WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "red",
    "old",
    "small",
    "bridge",
    "over",
    "water",
    "with",
    "trees",
    "and",
    "people",
    "in",
    "summer",
]


def main() -> None:
    """Write the shards, measure each side in turns, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--num-samples", type=int, default=2560)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for longest in (500, 1000):
            folder = Path(scratch) / str(longest)
            samples = photographs(arguments.photos, arguments.num_samples, longest=longest)
            write_shards(samples, folder, prefix="photo", samples_per_shard=128)
            build_manifest(folder)
            results[f"longest_side_{longest}"] = compare(folder, arguments.rounds)
    text = json.dumps(results, indent=2)
    sys.stdout.write(text + "\n")
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


def photographs(folder: Path, count: int, *, longest: int) -> Iterator[Sample]:
    """Crops of 4 to 3 with captions, JPEG quality 90."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix in {".jpg", ".png"})
    originals = []
    for path in paths:
        with Image.open(path) as image:
            if min(image.size) >= 400 and image.mode == "RGB":
                originals.append(image.copy())
    if len(originals) < 5:
        message = f"{folder}: {len(originals)} photographs of 400 pixels, at least 5 are needed"
        raise SystemExit(message)
    generator = np.random.default_rng(0)
    for number in range(count):
        original = originals[number % len(originals)]
        width = int(generator.uniform(0.6, 1.0) * min(original.width, original.height * 4 / 3))
        left = int(generator.integers(original.width - width + 1))
        top = int(generator.integers(original.height - width * 3 // 4 + 1))
        crop = original.crop((left, top, left + width, top + width * 3 // 4))
        size = (longest, longest * 3 // 4)
        size = size if number % 3 else (size[1], size[0])
        buffer = io.BytesIO()
        crop.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        caption = " ".join(generator.choice(WORDS, size=int(generator.integers(5, 20))))
        yield Sample(key=f"{number:06d}", image=buffer.getvalue(), text=caption)


def compare(folder: Path, rounds: int) -> dict[str, Any]:
    """Both sides in turns, so that neither has the quieter machine; medians of the rounds."""
    sides = {
        "open_clip": _open_clip,
        "ours": partial(_ours, normalise=False, margin=None),
        "ours_normalised_on_the_cpu": partial(_ours, normalise=True, margin=None),
        "ours_reduced_jpeg": partial(_ours, normalise=False, margin=1.5),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(_in_process(side, folder))
    medians = {
        name: {key: round(float(np.median([r[key] for r in runs])), 1) for key in runs[0]}
        for name, runs in found.items()
    }
    rival = medians["open_clip"]["images_a_second"]
    return {
        **medians,
        "ratio": {
            name: round(values["images_a_second"] / rival, 2)
            for name, values in medians.items()
            if name != "open_clip"
        },
        "gray_levels_from_open_clip": {
            "full": _pixel_distance(folder, margin=None),
            "reduced_jpeg": _pixel_distance(folder, margin=1.5),
        },
        "milliseconds_an_image_one_core": _where_time_goes(folder),
    }


def _in_process(side: Any, folder: Path) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(side, folder, sender))
    process.start()
    sender.close()  # so that a process that dies is noticed
    peak, stop = [0.0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, stop))
    watcher.start()
    images, seconds = receiver.recv()
    stop.set()
    watcher.join()
    process.join()
    return {"images_a_second": images / seconds, "peak_mib": peak[0] / 1024}


def _measure(side: Any, folder: Path, sender: Any) -> None:
    # open_clip's workers are forked: its pipeline holds functions that cannot be pickled.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    batches = side(folder)
    first = next(batches)
    assert tuple(first[0].shape[1:]) == (3, SIZE, SIZE), first[0].shape
    count, start = 0, time.perf_counter()
    for images, _ in batches:
        count += len(images)
    sender.send((count, time.perf_counter() - start))


def _ours(folder: Path, *, normalise: bool, margin: float | None) -> Iterator[tuple[Any, Any]]:
    manifest = open_manifest(folder)
    config = StreamConfig(threads=WORKERS, cache_bytes=0)
    image = ImageConfig(size=SIZE, jpeg_margin=margin)
    stream = TrainStream(
        sources=[Source(name="photos", reader=Reader(manifest), captions=config.captions)],
        plan=only(Plan(num_samples=manifest.num_samples, global_batch=BATCH, seed=0)),
        config=config,
        prepare_image=partial(prepare_image, config=image),
        stack_images=stack_images,
        tokenize=build_tokenizer(TokenizerConfig()),
    )
    for batch in stream.batches(0, manifest.num_samples // BATCH):
        yield normalise_images(batch.images, image) if normalise else batch.images, batch.token_ids


def _open_clip(folder: Path) -> Iterator[tuple[Any, Any]]:
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import image_transform

    # It imports pandas for tables of images, which are not read here.
    pandas = types.ModuleType("pandas")
    pandas.__spec__ = importlib.machinery.ModuleSpec("pandas", None)
    sys.modules.setdefault("pandas", pandas)
    import open_clip_train.data

    # Its own grouping stops at an entry that webdataset 1 adds at the end of each shard.
    group = open_clip_train.data.group_by_keys_nothrow
    open_clip_train.data.group_by_keys_nothrow = lambda data, **options: group(
        (member for member in data if "fname" in member), **options
    )
    manifest = open_manifest(folder)
    arguments = argparse.Namespace(
        train_data=f"{folder}/photo-{{000000..{len(manifest.shards) - 1:06d}}}.tar",
        train_num_samples=manifest.num_samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        workers=WORKERS,
        world_size=1,
        batch_size=BATCH,
    )
    data = open_clip_train.data.get_wds_dataset(
        arguments,
        image_transform(SIZE, is_train=False),
        is_train=True,
        floor=True,
        tokenizer=SimpleTokenizer(),
    )
    yield from data.dataloader


def _watch(pid: int, peak: list[float], stop: threading.Event) -> None:
    while not stop.wait(0.1):
        peak[0] = max(peak[0], sum(map(_kib, _family(pid))))


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in _family(int(child)))]


def _kib(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def _pixel_distance(folder: Path, *, margin: float | None) -> dict[str, float]:
    """Distance of our pixels from open_clip's, in gray levels, over 64 photographs."""
    from open_clip.transform import image_transform

    config = ImageConfig(size=SIZE, jpeg_margin=margin)
    transform = image_transform(SIZE, is_train=False, mean=config.mean, std=config.std)
    mean = torch.tensor(config.mean).view(3, 1, 1)
    std = torch.tensor(config.std).view(3, 1, 1)
    distances = []
    with Reader(open_manifest(folder)) as reader:
        for row in range(64):
            data = reader.read(row).image
            theirs = (transform(Image.open(io.BytesIO(data))) * std + mean) * 255
            ours = torch.from_numpy(prepare_image(data, config).copy()).float()
            distances.append((theirs.round() - ours).abs())
    levels = torch.stack(distances)
    return {
        "mean": round(float(levels.mean()), 3),
        "mean_of_the_worst_image": round(float(levels.mean(dim=(1, 2, 3)).max()), 3),
        "max": float(levels.max()),
    }


def _where_time_goes(folder: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    config, tokenize = ImageConfig(size=SIZE), build_tokenizer(TokenizerConfig())
    with Reader(open_manifest(folder)) as reader:
        spent: dict[str, float] = {}

        def timed(name: str, function: Any, items: list[Any]) -> list[Any]:
            start = time.perf_counter()
            found = [function(item) for item in items]
            spent[name] = round((time.perf_counter() - start) / len(items) * 1e3, 3)
            return found

        samples = timed("read", reader.read, list(range(256)))
        pixels = timed("decode", decode_image, [sample.image for sample in samples])
        squares = timed("resize", lambda image: resize_image(image, config), pixels)
        timed("stack", lambda n: stack_images(squares[n : n + 1]), list(range(256)))
        timed("tokenize", lambda sample: tokenize([sample.text]), samples)
    return spent


if __name__ == "__main__":
    main()
