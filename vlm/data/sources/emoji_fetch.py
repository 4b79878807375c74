"""`vlm data fetch emoji`: npm packages to shards, one dataset folder a split.

FOLDER/packages/        unpacked npm packages
FOLDER/shards/SPLIT/    webdataset shards by style, with manifest
FOLDER/LICENSES.md      whose drawings these are, and what their licences ask
FOLDER/fetched.json     what was fetched; written last, so it vouches for the rest
"""

import io
import itertools
import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import resvg_py
from PIL import Image

from vlm.data.manifest import build_manifest, open_manifest
from vlm.data.samples import Sample
from vlm.data.sources.emoji import (
    CONCEPTS_PACKAGE,
    SPLIT_RULE,
    STYLES,
    Drawing,
    Style,
    drawings_of,
    is_unseen_concept,
    read_concepts,
    split_of,
)
from vlm.data.sources.npm import fetch_package
from vlm.data.write import write_shards
from vlm.errors import DataError
from vlm.files import write_text_whole
from vlm.preprocess import flatten_image

__all__ = ["DEFAULT_STYLES", "fetch_emoji"]

DEFAULT_STYLES: Final = tuple(name for name in STYLES if name != "fluent_3d")
_MAX_BAD_FRACTION: Final = 0.02
_CHUNK: Final = 32
_LICENSES: Final = {
    "Apache-2.0": ("https://www.apache.org/licenses/LICENSE-2.0", "keep the notice"),
    "MIT": ("https://opensource.org/license/mit", "keep the notice"),
    "CC-BY-4.0": ("https://creativecommons.org/licenses/by/4.0/", "name the author"),
    "CC-BY-SA-4.0": (
        "https://creativecommons.org/licenses/by-sa/4.0/",
        "name the author, share adapted drawings under the same licence",
    ),
}
Say = Callable[[str], None]


def fetch_emoji(
    folder: Path, *, styles: Sequence[str], size: int, workers: int, say: Say
) -> dict[str, int]:
    """Download, rasterise and write the emoji pairs, or return at once if they are all there.

    Args:
        folder: Where everything goes; see the module's docstring.
        styles: Names out of `STYLES`.
        size: Side of the images in pixels.
        workers: Processes that rasterise.
        say: Told one line a stage.

    Returns:
        Number of samples a split.

    Raises:
        DataError: If a style is unknown, a download fails, or over 2% of a style's drawings
            cannot be rasterised.
    """
    unknown = [name for name in styles if name not in STYLES]
    if unknown:
        message = f"no such style: {', '.join(unknown)}; known are {', '.join(STYLES)}"
        raise DataError(message)
    packages = {name: STYLES[name].package for name in sorted(styles)}
    wanted = {
        "concepts": CONCEPTS_PACKAGE,
        "styles": packages,
        "size": size,
        "split": SPLIT_RULE,
    }
    found = _already_there(folder, wanted)
    if found is not None:
        say(f"{folder}: already fetched, {sum(found.values())} pairs")
        return found
    shards = folder / "shards"
    draft = folder / ".shards-draft"
    shutil.rmtree(draft, ignore_errors=True)
    counts = _write_all(folder, draft, packages, size=size, workers=workers, say=say)
    for split_folder in sorted(draft.iterdir()):
        build_manifest(split_folder)
    (folder / "fetched.json").unlink(missing_ok=True)
    shutil.rmtree(shards, ignore_errors=True)
    draft.rename(shards)
    write_text_whole(folder / "LICENSES.md", _licenses(counts))
    splits: Counter[str] = Counter()
    for (_, split), count in counts.items():
        splits[split] += count
    tree = {**wanted, "samples": dict(splits)}
    write_text_whole(folder / "fetched.json", json.dumps(tree, indent=1, sort_keys=True) + "\n")
    return dict(splits)


def _already_there(folder: Path, wanted: dict[str, Any]) -> dict[str, int] | None:
    try:
        tree = json.loads((folder / "fetched.json").read_text(encoding="utf-8"))
        if any(tree.get(key) != value for key, value in wanted.items()):
            return None
        samples: dict[str, int] = tree["samples"]
        for split in samples:
            open_manifest(folder / "shards" / split)
    except (OSError, ValueError, KeyError, DataError):
        return None  # nothing there, or damaged: make it anew
    return samples


def _write_all(
    folder: Path, draft: Path, styles: Iterable[str], *, size: int, workers: int, say: Say
) -> Counter[tuple[str, str]]:
    """Shards of all styles and splits under `draft`; counts by (style, split)."""
    packages = folder / "packages"
    concepts = read_concepts(fetch_package(CONCEPTS_PACKAGE, packages))
    counts: Counter[tuple[str, str]] = Counter()
    # Spawned, not forked: a fork of a process with threads may hang. Ctrl-C reaches the whole
    # process group; workers leave it to the parent, or their queues would be torn mid-message.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_ignore_interrupts
    )
    try:
        for name in styles:
            style = STYLES[name]
            drawings = list(drawings_of(style, fetch_package(style.package, packages), concepts))
            images = pool.map(_rasterise, [d.svg for d in drawings], [size] * len(drawings),
                              chunksize=_CHUNK)  # fmt: skip
            pairs = list(zip(drawings, images, strict=True))
            good = [(drawing, image) for drawing, image in pairs if image is not None]
            _refuse_many_bad(style, len(pairs) - len(good), len(pairs))
            by_split = sorted(good, key=lambda pair: split_of(style, pair[0].concept.id))
            for split, group in itertools.groupby(
                by_split, key=lambda pair: split_of(style, pair[0].concept.id)
            ):
                samples = [_sample(drawing, image) for drawing, image in group]
                write_shards(samples, draft / split, prefix=name)
                counts[name, split] = len(samples)
            say(f"{name}: {len(good)} drawings, {style.license}, {style.author}")
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return counts


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _rasterise(svg: str, size: int) -> bytes | None:
    """An SVG as lossless WebP, centred on a white square; none if it cannot be drawn."""
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    except ValueError:
        return None
    with Image.open(io.BytesIO(bytes(png))) as image:
        drawing = image.convert("RGBA")
    square = Image.new("RGBA", (size, size))
    drawing.thumbnail((size, size))
    square.paste(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    buffer = io.BytesIO()
    flatten_image(square).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def _refuse_many_bad(style: Style, bad: int, total: int) -> None:
    if total == 0 or bad > _MAX_BAD_FRACTION * total:
        message = (
            f"{style.package}: {bad} of {total} drawings could not be rasterised, at most "
            f"{_MAX_BAD_FRACTION:.0%} may fail; is resvg_py of a supported version?"
        )
        raise DataError(message)


def _sample(drawing: Drawing, image: bytes) -> Sample:
    concept, style = drawing.concept, drawing.style
    return Sample(
        key=f"{style.name}-{concept.id}",
        image=image,
        text=concept.name,
        metadata={
            "concept": concept.id,
            "name": concept.name,
            "tags": list(concept.tags),
            "style": style.name,
            "license": style.license,
            "author": style.author,
            "source": f"npm:{style.package}",
            "url": style.url,
            "unseen_style": style.held_out,
            "unseen_concept": is_unseen_concept(concept.id),
        },
    )


def _licenses(counts: Counter[tuple[str, str]]) -> str:
    rows = []
    for name, style in STYLES.items():
        total = sum(count for (found, _), count in counts.items() if found == name)
        if total:
            link, duty = _LICENSES[style.license]
            rows.append(
                f"| {name} | [{style.author}]({style.url}) | {style.package} "
                f"| [{style.license}]({link}) | {duty} | {total} |"
            )
    return "\n".join(
        [
            "# Whose drawings these are",
            "",
            "Every sample carries its licence, author and source in its `.json`.",
            f"Names and tags come from {CONCEPTS_PACKAGE} (MIT).",
            "",
            "| style | author | npm package | licence | it asks to | images |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
