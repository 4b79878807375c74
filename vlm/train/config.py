"""The configuration of one training run."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from vlm.config import Config
from vlm.data.augment import AugmentConfig
from vlm.data.dataset import SourceConfig, StageConfig
from vlm.data.object_store import RemoteConfig, check_url
from vlm.data.stream import StreamConfig
from vlm.errors import DataError
from vlm.losses import LossTerm, RemembersSamples, WeightSchedule
from vlm.models import ModelConfig
from vlm.optim import OptimizerConfig
from vlm.preprocess import AnyTokenizerConfig, ImageConfig, TokenizerConfig
from vlm.train.sinks import TelemetryConfig

__all__ = [
    "DataConfig",
    "DeepSpeedEngineConfig",
    "EngineConfig",
    "FsdpEngineConfig",
    "RecoveryConfig",
    "TeacherConfig",
    "TorchEngineConfig",
    "TrainConfig",
]


class DataConfig(Config):
    """Where the pairs are and how they become batches."""

    shards: str | None = None
    """A dataset folder or URL: webdataset tars with their manifest. This or `sources`."""
    filter: str | None = None
    """Name of a filter of `shards`, written by `vlm data filter`."""
    sources: tuple[SourceConfig, ...] = ()
    """Several datasets, mixed by weight."""
    curriculum: tuple[StageConfig, ...] = ()
    """Changes of the sources' weights, by step."""
    remote: RemoteConfig = RemoteConfig()
    stream: StreamConfig = StreamConfig()
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _sources_agree(self) -> "DataConfig":
        if (self.shards is None) == (not self.sources):
            message = "give exactly one of shards and sources"
            raise ValueError(message)
        if self.filter is not None and self.sources:
            message = "give filter to each of the sources"
            raise ValueError(message)
        names = [source.name for source in self.all_sources]
        if len(set(names)) < len(names):
            message = f"names of sources must differ, found {', '.join(names)}"
            raise ValueError(message)
        _check_weights("sources", {source.name: source.weight for source in self.all_sources})
        steps = [stage.from_step for stage in self.curriculum]
        if steps != sorted(set(steps)):
            message = f"curriculum: from_step must rise from stage to stage, found {steps}"
            raise ValueError(message)
        for stage in self.curriculum:
            unknown = sorted(set(stage.weights) - set(names))
            if unknown:
                message = (
                    f"curriculum: no source is called {', '.join(unknown)}; there are "
                    f"{', '.join(names)}"
                )
                raise ValueError(message)
            _check_weights(f"curriculum from step {stage.from_step}", stage.weights)
        return self

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The mixture, also where it is one dataset."""
        if self.shards is None:
            return self.sources
        return (SourceConfig(name="shards", shards=self.shards, filter=self.filter),)


def _check_weights(where: str, weights: dict[str, float]) -> None:
    if min(weights.values(), default=0) < 0 or sum(weights.values()) <= 0:
        message = f"{where}: weights must be at least 0 and one above, found {weights}"
        raise ValueError(message)


class TorchEngineConfig(Config):
    """Plain PyTorch: one process, or distributed data parallel under torchrun."""

    type: Literal["torch"] = "torch"
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """Of the towers; losses are always fp32. `auto` is bf16 where the device computes in it. fp16
    scales the loss, and skips a step whose gradients overflow. fp8 is bf16 with the products of
    large linear layers in 8 bits; needs the package torchao and a device that has them."""
    compile: bool = False
    """Compile the model with torch.compile: minutes at the start, faster steps afterwards."""


class DeepSpeedEngineConfig(Config):
    """DeepSpeed ZeRO; needs the `deepspeed` extra."""

    type: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What is spread over ranks: 1 the optimizer's state, 2 gradients too, 3 parameters too."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    offload: bool = False
    """Keep what is spread over ranks in main memory, and step there."""
    persistence_threshold: int = Field(100_000, ge=0)
    """At stage 3, parameters of fewer elements stay whole on every rank."""

    @model_validator(mode="after")
    def _stage_can(self) -> "DeepSpeedEngineConfig":
        if self.zero_stage == 0 and (self.offload or self.precision == "fp16"):
            message = "zero_stage=0 neither offloads nor computes in fp16; choose 1, 2 or 3"
            raise ValueError(message)
        return self


class FsdpEngineConfig(Config):
    """PyTorch's FSDP2: parameters, gradients and optimizer state spread over the ranks."""

    type: Literal["fsdp"] = "fsdp"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the towers; losses are always fp32, and so are the parameters that the optimizer sees."""
    offload: bool = False
    """Keep parameters and optimizer state in main memory, and step there."""


EngineConfig = Annotated[
    TorchEngineConfig | FsdpEngineConfig | DeepSpeedEngineConfig, Field(discriminator="type")
]


class RecoveryConfig(Config):
    """What to do when the loss or its gradient is no longer finite, or leaps.

    The run goes back to its last checkpoint and leaves out the steps that led there.
    """

    max_rollbacks: int = Field(3, ge=0)
    """Of the whole run, over all resumes; after that it ends with an error."""
    skip_steps: int = Field(1, ge=1)
    """Steps left out: the one that went wrong, and those before it."""
    spike_factor: float | None = Field(None, gt=1)
    """A gradient norm of this many times the median of the last 100 is a fault; none are."""
    stuck_after_seconds: float = Field(120.0, gt=0)
    """Without progress, to wait before saying which rank keeps the others waiting."""


class TemperatureSchedule(WeightSchedule):
    """A temperature that is set, not learnt: linear between points of training.

    Raising it closes the gap between the modalities. Source: temperature scheduling of
    arXiv:2412.07909, from 0.01 to 0.02 and up to 0.05.
    """

    @model_validator(mode="after")
    def _scales_are_in_range(self) -> "TemperatureSchedule":
        wrong = [value for value in self.value if not 0.01 <= value <= 1]
        if wrong:
            message = f"temperatures must lie in [0.01, 1], found {wrong}"
            raise ValueError(message)
        return self


class HeldOutConfig(Config):
    """Evaluation in the middle of a run, of the weights that would be exported."""

    tasks: Path
    """A file of `configs/evaluate`."""
    every: int = Field(500, ge=1)
    """Steps between two evaluations, each of a checkpoint saved for it; the end is one too."""


class TeacherConfig(Config):
    """A frozen model that terms of the loss follow."""

    bundle: Path
    """Its folder, as `vlm export` writes it."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of its towers; `auto` is bf16 where the device computes in it."""


class TrainConfig(Config):
    """Everything that decides a run. One YAML file holds one of these."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The run's folder under `output`."""
    output: Path = Path("runs")
    seed: int = Field(0, ge=0, lt=2**31)
    steps: int | None = Field(None, ge=1)
    """Optimizer steps; give this, `samples` or `epochs`."""
    samples: int | None = Field(None, ge=1)
    """Samples seen, rounded up to whole steps."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data."""
    global_batch: int = Field(256, ge=2)
    """Samples of one optimizer step, over all ranks."""
    micro_batch: int | None = Field(None, ge=1)
    """Most samples of one rank in one forward; a rank's larger share of the global batch goes
    through the gradient cache in micro-batches of this size. None: the share at once."""
    image: ImageConfig = ImageConfig()
    tokenizer: AnyTokenizerConfig = TokenizerConfig()
    data: DataConfig
    model: ModelConfig
    loss: list[LossTerm] = Field(min_length=1)
    temperature: TemperatureSchedule | None = None
    """Sets the temperature over training; none: the model learns it."""
    teacher: TeacherConfig | None = None
    """A frozen model whose embeddings terms of the loss follow, or that masks their negatives."""
    optim: OptimizerConfig
    engine: EngineConfig = TorchEngineConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    evaluation: HeldOutConfig | None = None
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of the moving average of weights that is exported instead of the last weights."""
    telemetry: TelemetryConfig = TelemetryConfig()
    log_every: int = Field(10, ge=1)
    """Steps between two records in `metrics.jsonl`."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between two checkpoints; one is always saved at the end and on interruption."""
    keep_checkpoints: int = Field(2, ge=1)
    checkpoints: str | None = None
    """A folder in an object store, s3://, gs:// or az://, where checkpoints go under the run's
    name; credentials come from the environment. None: the run's folder."""

    @model_validator(mode="after")
    def _sections_agree(self) -> "TrainConfig":
        if [self.steps, self.samples, self.epochs].count(None) != 2:
            message = "give exactly one of steps, samples and epochs"
            raise ValueError(message)
        if self.epochs is not None and len(self.data.sources) > 1:
            message = "a mixture has no epochs of its own: give steps"
            raise ValueError(message)
        if self.optim.whole_matrices and self.engine.type == "deepspeed":
            message = (
                f"optim.type={self.optim.type} looks at whole matrices, which DeepSpeed flattens: "
                f"take lion or adamw, or engine.type=torch"
            )
            raise ValueError(message)
        small_size = self.data.augment.views.small_size
        tower = "given" if self.model.image is None else self.model.image.type
        if small_size not in (None, self.image.size) and tower != "timm":
            message = (
                f"data.augment.views.small_size={small_size}: a {tower} tower "
                f"reads {self.image.size} pixels only; leave small_size out, or use a "
                f"convolutional timm tower"
            )
            raise ValueError(message)
        needs_bias = any(term.type == "siglip" for term in self.loss)
        if needs_bias and self.model.init_logit_bias is None:
            message = "loss siglip needs a logit bias: set model.init_logit_bias, e.g. -10"
            raise ValueError(message)
        if (self.model.type == "coca") != any(term.type == "caption" for term in self.loss):
            message = (
                f"model.type={self.model.type}: a coca, and only a coca, is trained with the loss "
                f"caption. Add or remove {{type: caption}}, or choose the other model"
            )
            raise ValueError(message)
        if self.model.type == "coca" and self.data.augment.views.total > 1:
            message = "a coca reads one view of an image: leave data.augment.views out"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _tokenizer_suits_the_text_tower(self) -> "TrainConfig":
        kind = None if self.model.text is None else getattr(self.model.text, "type", "coca")
        ends = kind == "coca" or getattr(self.model.text, "pool", None) == "end"
        if self.tokenizer.type == "huggingface" and ends:
            message = (
                "tokenizer.type=huggingface: this text tower finds a caption's end by the highest "
                "id, which is the byte-pair tokenizer's end mark; set tokenizer.type=simple"
            )
            raise ValueError(message)
        if self.tokenizer.type != "huggingface" and kind == "huggingface":
            message = (
                "model.text.type=huggingface needs the tokenizer it was made with: set "
                "tokenizer.type=huggingface and tokenizer.source"
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _teacher_is_needed(self) -> "TrainConfig":
        needing = [term.type for term in self.loss if term.needs_teacher]
        if needing and self.teacher is None:
            message = f"loss {', '.join(needing)} needs a teacher: set teacher.bundle"
            raise ValueError(message)
        if self.teacher is not None and not needing:
            message = "no term of the loss asks the teacher: leave the teacher section out"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _labels_are_read(self) -> "TrainConfig":
        needing = [term.type for term in self.loss if term.needs_labels]
        if needing and self.data.stream.label_field is None:
            message = f"loss {', '.join(needing)} compares labels: set data.stream.label_field"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _average_is_in_reach(self) -> "TrainConfig":
        stage = self.engine.zero_stage if self.engine.type == "deepspeed" else 0
        if stage == 3 and self.ema_decay is not None:
            message = (
                "ema_decay: the weights of deepspeed's zero_stage=3 are out of reach between "
                "steps; leave ema_decay out, or take engine.type=fsdp, which shards as much"
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _temperature_can_be_set(self) -> "TrainConfig":
        if self.temperature is None:
            return self
        learning = [term.type for term in self.loss if term.type in ("fastclip_v3", "isogclr")]
        if learning:
            message = f"temperature: loss {', '.join(learning)} has a temperature of its own"
            raise ValueError(message)
        if self.engine.type == "deepspeed" and self.engine.zero_stage == 3:
            message = "temperature: ZeRO 3 lets no parameter be set; choose another engine"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _recall_is_measured(self) -> "TrainConfig":
        if self.guards_recall and self.evaluation is None:
            message = "a guard of the loss has recall_drop: set evaluation.tasks, or leave it out"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _memories_are_apart(self) -> "TrainConfig":
        remembering = [
            term.type
            for term in self.loss
            if isinstance(term, RemembersSamples) or getattr(term, "guard", None)
        ]
        twice = sorted({kind for kind in remembering if remembering.count(kind) > 1})
        if twice:
            message = f"loss {', '.join(twice)} is listed twice and would share one memory"
            raise ValueError(message)
        return self

    @field_validator("checkpoints")
    @classmethod
    def _is_a_store(cls, url: str | None) -> str | None:
        try:
            if url is not None:
                check_url(url, schemes=("s3", "gs", "az"))
        except DataError as error:
            raise ValueError(str(error)) from error
        return url

    @property
    def guards_recall(self) -> bool:
        """Whether a weight of the loss depends on held-out recall."""
        guards = [getattr(term, "guard", None) for term in self.loss]
        return any(guard is not None and guard.recall_drop is not None for guard in guards)

    @property
    def run_folder(self) -> Path:
        return self.output / self.name

    def total_steps(self, num_samples: int) -> int:
        """Optimizer steps of the whole run over a dataset of `num_samples`."""
        if self.steps is not None:
            return self.steps
        if self.samples is not None:
            return math.ceil(self.samples / self.global_batch)
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * num_samples / self.global_batch))
