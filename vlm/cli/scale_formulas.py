"""What training, search and serving need at a size that nobody here has run: plain arithmetic.

Bytes are those of one rank and one step unless said otherwise. Those that `tests/vlm/cli/
test_scale.py` can count on 1, 2 and 4 real ranks, it does; k8s/SCALE.md says which.

Sources: ring collectives, Thakur, Rabenseifner & Gropp 2005, doi:10.1177/1094342005051521;
checkpoint interval, Young 1974, doi:10.1145/361147.361115, and Daly 2006,
doi:10.1016/j.future.2004.11.016.
"""

import math
from dataclasses import dataclass

__all__ = [
    "Checkpointing",
    "checkpoint_bytes",
    "daly_interval",
    "feature_bytes",
    "gather_traffic",
    "goodput",
    "gradient_bytes",
    "joined_bytes",
    "loss_flops",
    "loss_memory",
    "mean_seconds_between_failures",
    "milvus_bytes",
    "replicas",
    "ring_loss_traffic",
    "ring_traffic",
    "scan_seconds",
    "search_bytes",
    "young_interval",
]

_FLOAT = 4
_ID = 8


def ring_traffic(payload: int | float, ranks: int) -> float:
    """Bytes that each rank sends in an all-reduce of a payload: 2 (W - 1) / W of it."""
    return 2 * (ranks - 1) / ranks * payload


def gradient_bytes(parameters: int) -> int:
    """Payload of the gradients' all-reduce: float32."""
    return _FLOAT * parameters


def feature_bytes(global_batch: int, dim: int, *, ranks: int) -> int:
    """Payload that a rank hands to the loss's all-gathers: both modalities, groups and ids."""
    return global_batch // ranks * (2 * dim * _FLOAT + 2 * _ID)


def gather_traffic(global_batch: int, dim: int, *, ranks: int) -> float:
    """Bytes that each rank sends for a loss of one contrastive term, as the engine does it.

    Forward an all-gather in a ring, in which its own part and those of W - 2 others pass through
    it; backward an all-reduce of the gradients of all rows; and what joins the parts of the loss.
    """
    forward = (ranks - 1) * feature_bytes(global_batch, dim, ranks=ranks)
    reduced = 2 * _FLOAT * global_batch * dim + joined_bytes(global_batch)
    return forward + ring_traffic(reduced, ranks)


def joined_bytes(global_batch: int) -> int:
    """Payload of the all-reduces that join what ranks found in their rows, for one term.

    Forward a maximum and a sum for each row and column, backward a gradient of each; and one
    figure for the log.
    """
    return _FLOAT * (3 * 2 * global_batch + 1)


def ring_loss_traffic(global_batch: int, dim: int, *, ranks: int) -> float:
    """The same, if captions went around a ring and images stayed where they are.

    Blocks of captions pass W - 1 times forward, and their gradients with them backward; then one
    more step brings the gradients home. As SigLIP does it (arXiv:2303.15343, section 3.3).
    """
    if ranks == 1:
        return 0.0
    block = global_batch // ranks * dim * _FLOAT
    return float((ranks - 1) * block + ((ranks - 1) * 2 + 1) * block)


def loss_memory(global_batch: int, dim: int, *, tile: int = 4096) -> int:
    """Bytes of the loss on a rank: all rows and their gradients, two numbers a row, three tiles."""
    side = min(tile, global_batch)
    return _FLOAT * (2 * 2 * global_batch * dim + 2 * 2 * global_batch + 3 * side * side)


def loss_flops(global_batch: int, dim: int, *, ranks: int) -> float:
    """Operations of one contrastive term on each rank, which reduces B / W rows of logits.

    A product forward; backward the product again and two more for the gradients.
    """
    return 4 * 2.0 * global_batch**2 / ranks * dim


def checkpoint_bytes(parameters: int, *, moments: int, ema: bool) -> int:
    """Bytes of a checkpoint: float32 weights, the optimizer's moments, and the moving average.

    Args:
        parameters: Of the model, buffers included.
        moments: Of the optimizer: 1 for Lion, 2 for AdamW.
        ema: Whether the run keeps a moving average.
    """
    return _FLOAT * parameters * (1 + moments + int(ema))


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Times of one run, in seconds."""

    save: int | float
    """One checkpoint, during which training waits."""
    restart: int | float
    """From a failure to the first new step."""
    between_failures: int | float
    """Mean time between failures of the whole job."""


def mean_seconds_between_failures(gpus: int, *, gpu_hours: int | float) -> float:
    """Of a job that any GPU's failure ends; `gpu_hours` is the mean of one GPU."""
    return gpu_hours * 3600 / gpus


def young_interval(times: Checkpointing) -> float:
    """Seconds of training between two checkpoints, to first order: sqrt(2 C M)."""
    return math.sqrt(2 * times.save * times.between_failures)


def daly_interval(times: Checkpointing) -> float:
    """The same to higher order; M where a checkpoint takes longer than two failures are apart."""
    ratio = times.save / (2 * times.between_failures)
    if ratio >= 1:
        return times.between_failures
    return young_interval(times) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - times.save


def goodput(times: Checkpointing, interval: int | float) -> float:
    """Fraction of wall time that is training which lasts, 0 to 1.

    Daly's model with exponential failures, which may strike while saving and restarting:
    tau / (M e^(R / M) (e^((tau + C) / M) - 1)).
    """
    mean = times.between_failures
    if (interval + times.save + times.restart) / mean > 500:
        return 0.0
    lost = math.exp(times.restart / mean) * math.expm1((interval + times.save) / mean)
    return interval / (mean * lost)


def search_bytes(count: int, dim: int) -> tuple[int, int]:
    """Bytes of a collection: float32 vectors on disk, and codes of a bit a dimension in memory.

    The codes are RaBitQ's (arXiv:2405.12497): dim / 8 bytes and two factors, plus an id.
    """
    return count * dim * _FLOAT, count * (dim // 8 + 2 * _FLOAT + _ID)


def milvus_bytes(count: int, dim: int, *, payload: int = 1024) -> int:
    """Memory of all query nodes for one copy of a collection in Milvus, searched by IVF-FLAT.

    Vectors are float32 and in memory, like ids, texts and metadata (`payload` bytes an item);
    half as much again is for growing segments and those that are being loaded or merged.
    """
    return count * (dim * _FLOAT + payload) * 3 // 2


def scan_seconds(num_bytes: int | float, *, bandwidth: int | float) -> float:
    """A query that reads this much, at the bandwidth of memory or disk in bytes a second."""
    return num_bytes / bandwidth


def replicas(rate: int | float, *, each: int | float, utilisation: float = 0.6) -> int:
    """Servers for a rate of requests a second, if one answers `each` and may be so busy."""
    return max(1, math.ceil(rate / (each * utilisation)))
