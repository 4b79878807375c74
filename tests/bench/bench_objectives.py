"""Every objective on the demo's data at equal samples: `make bench-objectives`.

    python -m tests.bench.bench_objectives --out build/objectives.json --set image.size=32

Trains each `configs/train/demo*.yaml` with each seed, evaluates the newest weights on the style
that training never saw, and adds one record a run to the JSON file. Runs that are in the file, made
with the same overrides, are not trained again, so it can be stopped and started; a run that was
stopped resumes from its checkpoint. `--table` prints the file as the Markdown table of
`vlm/losses/README.md`: mean and standard deviation over seeds.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm.config import load_config
from vlm.distributed import World
from vlm.files import write_text_whole
from vlm.openmp import let_idle_threads_sleep
from vlm.train import TrainConfig, train

CONFIGS = sorted(Path("configs/train").glob("demo*.yaml"))
TASKS = Path("configs/evaluate/emoji.yaml")
TASK = "unseen_style_seen_concepts"
COLUMNS = {
    "top1": "top-1, %",
    "image_to_text_r1": "image → text R@1, %",
    "text_to_image_r1": "text → image R@1, %",
    "centroid_gap": "centroid gap",
    "separability": "separability",
    "uniformity": "uniformity above floor",
    "effective_rank": "effective rank",
}


def main() -> int:
    """Train what is missing and write the file, or print it as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", nargs="+", default=[], help="dotted.key=value for every run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="names of configurations")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    records = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    if arguments.table:
        sys.stdout.write(table(records))
        return 0
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    let_idle_threads_sleep()
    chosen = [path for path in CONFIGS if not arguments.only or path.stem in arguments.only]
    for seed in arguments.seeds:
        for config in chosen:
            wanted = {"objective": config.stem, "seed": seed, "overrides": arguments.set}
            if any(wanted.items() <= record.items() for record in records):
                continue
            measured = measure(config, seed, arguments.set, arguments.runs)
            if measured is None:
                return 75
            records.append({**wanted, **measured})
            write_text_whole(arguments.out, json.dumps(records, indent=2) + "\n")
    return 0


def measure(
    config: Path, seed: int, overrides: list[str], runs: Path
) -> dict[str, float | int] | None:
    """Train and evaluate one run; none if a signal stopped it."""
    name = f"{config.stem}-seed{seed}"
    own = [f"name={name}", f"output={runs}", f"seed={seed}", f"evaluation={{tasks: {TASKS}}}"]
    settings = load_config(TrainConfig, config, [*own, "evaluation.every=1000000", *overrides])
    start = time.monotonic()
    result = train(settings, world=World(), console=Console(soft_wrap=True), resume=True)
    if not result.finished:
        return None
    text = (settings.run_folder / "evaluation.json").read_text(encoding="utf-8")
    results = json.loads(text)["results"]
    retrieval, geometry = results[f"retrieval/{TASK}"], results[f"geometry/{TASK}"]
    return {
        "samples": result.total_steps * settings.global_batch,
        "seconds": round(time.monotonic() - start, 1),
        "top1": results[f"zero_shot/{TASK}"]["top1"],
        "image_to_text_r1": retrieval["image_to_text"]["recall1"],
        "text_to_image_r1": retrieval["text_to_image"]["recall1"],
        "centroid_gap": geometry["centroid_gap"],
        "separability": geometry["linear_separability"],
        "uniformity": _mean(geometry, "uniformity_above_floor"),
        "effective_rank": _mean(geometry, "effective_rank"),
    }


def _mean(geometry: dict[str, float], figure: str) -> float:
    return (geometry[f"image_{figure}"] + geometry[f"text_{figure}"]) / 2


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown, best zero-shot accuracy first."""
    by_objective: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_objective[record["objective"]].append(record)
    ranked = sorted(
        by_objective.items(), key=lambda item: -statistics.mean(r["top1"] for r in item[1])
    )
    lines = [
        "| configuration | seeds | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for objective, runs in ranked:
        cells = [_cell([run[column] for run in runs], COLUMNS[column]) for column in COLUMNS]
        lines.append(f"| {objective} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float], title: str) -> str:
    factor, digits = (100, 1) if title.endswith("%") else (1, 1 if "rank" in title else 3)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{factor * statistics.mean(values):.{digits}f} ± {factor * spread:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
