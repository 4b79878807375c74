"""How much arithmetic a sample costs, and how much a device could do."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm.train.config import TrainConfig
from vlm.train.setup import build_model

__all__ = ["flops_per_sample", "peak_flops"]

# Dense bfloat16 FLOP/s with fp32 accumulation, from the makers' data sheets; the first that fits.
_PEAKS = (
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("V100", 125e12),  # fp16
    ("T4", 65e12),  # fp16
)


def flops_per_sample(config: TrainConfig) -> float:
    """Floating-point operations of one sample's forward and backward pass through the model.

    A multiplication and an addition count as two. Counted on tensors without memory, so it costs
    neither time nor arithmetic. The loss, augmentation and recomputation are left out, as is usual
    for MFU; captions are counted at their full length, trimmed padding too.
    """
    views = config.data.augment.views.total
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build_model(config)
        images = torch.zeros(2, 3, config.image.size, config.image.size)
        token_ids = torch.zeros(2, config.tokenizer.context_length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        output = model(images, token_ids, *[images] * (views - 1))
        total = output.image.sum() + output.text.sum()
        for further in output.more_images:
            total = total + further.sum()
        if output.captions is not None:
            total = total + (output.captions.hidden @ output.captions.vocabulary.T).sum()
        total.backward()
    return counter.get_total_flops() / 2


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that the device can do in bfloat16, or none if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS if part in name), None)
