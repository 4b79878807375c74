"""`vlm export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vlm.errors import BundleError

if TYPE_CHECKING:
    from vlm.inference.runtimes import Figures

__all__ = ["export"]


def export(
    run: Annotated[Path, typer.Argument(help="A run folder, e.g. runs/demo, or a bundle.")],
    out: Annotated[
        Path | None, typer.Option(help="The bundle's folder; RUN/bundle by default.")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="Also make this runtime of the bundle: openvino or torch.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16, mixed or int8.")] = "bf16",
    shards: Annotated[
        Path | None,
        typer.Option(help="Dataset folder to calibrate and compare on; drawn pairs by default."),
    ] = None,
    pairs: Annotated[
        int, typer.Option(min=4, help="How many: half to fit mixed and int8, half to compare.")
    ] = 400,
    runtimes: Annotated[
        Path | None, typer.Option(help="Where runtimes are kept; default: beside the bundle.")
    ] = None,
) -> None:
    """Write the bundle of RUN: weights, preprocessing, tokenizer, means, provenance, metrics.

    With --runtime, the bundle is also exported to that runtime, which is then compared with torch
    in fp32 on this machine and refused if it strays.
    """
    console = Console(soft_wrap=True)
    is_bundle = (run / "bundle.json").is_file()
    if is_bundle and (out is not None or runtime is None):
        message = (
            f"{run}: already a bundle; say which runtime to make of it, e.g. --runtime openvino"
        )
        raise BundleError(message)
    folder = run if is_bundle else out or run / "bundle"
    if not is_bundle:
        from vlm.train.export import export_run  # noqa: PLC0415 - torch costs seconds

        info = export_run(run, folder, console=console)
        console.print(f"bundle {info.fingerprint[:12]} written to {folder}", highlight=False)
    if runtime is not None:
        name = f"{runtime}-{precision}"
        figures = _measured(
            name, folder, shards=shards, pairs=pairs, cache=runtimes, console=console
        )
        console.print(_report(figures), highlight=False)
        if figures.refused is not None:
            message = f"runtime {name} is refused: {figures.refused}"
            raise BundleError(message)


def _measured(
    name: str,
    bundle: Path,
    *,
    shards: Path | None,
    pairs: int,
    cache: Path | None,
    console: Console,
) -> "Figures":
    from vlm.inference import load_bundle  # noqa: PLC0415 - torch costs seconds
    from vlm.inference.runtimes import (  # noqa: PLC0415 - with it
        calibration_pairs,
        default_cache,
        drawn_calibration,
        export_runtime,
        runtime_name,
    )

    known = runtime_name(name)
    loaded = load_bundle(bundle)
    image = loaded.info.image
    calibration = (
        drawn_calibration(image, count=pairs)
        if shards is None
        else calibration_pairs(shards, image, count=pairs)
    )
    return export_runtime(
        known,
        loaded,
        cache=cache or default_cache(bundle),
        calibration=calibration,
        report=lambda line: console.print(line, highlight=False, markup=False),
    )


def _report(figures: "Figures") -> str:
    parity = figures.parity
    assert parity is not None
    return (
        f"{figures.runtime}: mean cosine to torch-fp32 {parity.image_cosine:.5f} (images), "
        f"{parity.text_cosine:.5f} (texts); top-1 agreement {parity.top1_agreement:.2%} over "
        f"{parity.calibration}; {figures.images_per_second:.1f} images/s, "
        f"{figures.texts_per_second:.1f} texts/s in batches of 8"
    )
