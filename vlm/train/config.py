"""The configuration of one training run."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlm.config import Config
from vlm.data.augment import AugmentConfig
from vlm.data.stream import StreamConfig
from vlm.losses import LossTerm
from vlm.models import DualEncoderConfig
from vlm.optim import OptimizerConfig
from vlm.preprocess import ImageConfig, TokenizerConfig

__all__ = [
    "DataConfig",
    "DeepSpeedEngineConfig",
    "EngineConfig",
    "TorchEngineConfig",
    "TrainConfig",
]


class DataConfig(Config):
    """Where the pairs are and how they become batches."""

    shards: Path
    """A dataset folder: webdataset tars with their manifest, as `vlm data write` leaves it."""
    stream: StreamConfig = StreamConfig()
    augment: AugmentConfig = AugmentConfig()


class TorchEngineConfig(Config):
    """Plain PyTorch: one process, or distributed data parallel under torchrun."""

    type: Literal["torch"] = "torch"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the towers; losses are always fp32. `auto` is bf16 where the device computes in it."""


class DeepSpeedEngineConfig(Config):
    """DeepSpeed ZeRO; needs the `deepspeed` extra."""

    type: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[0, 1, 2] = 2
    precision: Literal["fp32", "bf16"] = "bf16"


EngineConfig = Annotated[TorchEngineConfig | DeepSpeedEngineConfig, Field(discriminator="type")]


class TrainConfig(Config):
    """Everything that decides a run. One YAML file holds one of these."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The run's folder under `output`."""
    output: Path = Path("runs")
    seed: int = Field(0, ge=0, lt=2**31)
    steps: int | None = Field(None, ge=1)
    """Optimizer steps; give this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data; give this or `steps`."""
    global_batch: int = Field(256, ge=2)
    """Samples of one optimizer step, over all ranks."""
    image: ImageConfig = ImageConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    model: DualEncoderConfig
    loss: list[LossTerm] = Field(min_length=1)
    optim: OptimizerConfig
    engine: EngineConfig = TorchEngineConfig()
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of the moving average of weights that is exported instead of the last weights."""
    log_every: int = Field(10, ge=1)
    """Steps between two records in `metrics.jsonl`."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between two checkpoints; one is always saved at the end and on interruption."""
    keep_checkpoints: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _sections_agree(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            message = "give exactly one of steps and epochs"
            raise ValueError(message)
        needs_bias = any(term.type == "siglip" for term in self.loss)
        if needs_bias and self.model.init_logit_bias is None:
            message = "loss siglip needs a logit bias: set model.init_logit_bias, e.g. -10"
            raise ValueError(message)
        return self

    @property
    def run_folder(self) -> Path:
        return self.output / self.name

    def total_steps(self, num_samples: int) -> int:
        """Optimizer steps of the whole run over a dataset of `num_samples`."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * num_samples / self.global_batch))
