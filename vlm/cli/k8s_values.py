"""What a person decides about the cluster: `k8s/values.yaml`."""

from typing import Literal

from pydantic import Field, model_validator

from vlm.config import Config

__all__ = ["ClusterValues", "EmbedValues", "ServeValues", "TrainValues"]

_QUANTITY = r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"


class Images(Config):
    """Names with tags, as pushed."""

    train: str = Field("vlm-train:0.1.0", pattern=r"^[^:\s]+(:\d+/[^:\s]+)?:[\w.-]+$")
    serve: str = Field("vlm-serve:0.1.0", pattern=r"^[^:\s]+(:\d+/[^:\s]+)?:[\w.-]+$")


class TrainValues(Config):
    """The training job."""

    runner: Literal["job", "trainer"] = "job"
    """`job` needs no operator; `trainer` is Kubeflow Trainer 2."""
    nodes: int = Field(2, ge=1)
    ranks_per_node: int = Field(8, ge=1)
    gpus_per_node: int = Field(8, ge=0)
    """As many as ranks, or 0 to train on CPUs."""
    cpu: str = Field("64", pattern=_QUANTITY)
    memory: str = Field("512Gi", pattern=_QUANTITY)
    queue: str | None = None
    """A Kueue LocalQueue."""
    save_seconds: int = Field(300, ge=30)
    """After SIGTERM, for the step in progress and a checkpoint."""
    metrics: bool = False
    """Whether a container beside the trainer serves its figures to Prometheus; of a `job`."""
    storage_class: str | None = None
    data: str = Field("100Gi", pattern=_QUANTITY)
    runs: str = Field("100Gi", pattern=_QUANTITY)

    @model_validator(mode="after")
    def _agree(self) -> "TrainValues":
        if self.gpus_per_node not in (0, self.ranks_per_node):
            message = (
                f"gpus_per_node={self.gpus_per_node} and ranks_per_node={self.ranks_per_node}: "
                f"each rank drives one GPU, so give equal numbers, or gpus_per_node=0 for CPUs"
            )
            raise ValueError(message)
        if self.metrics and self.runner != "job":
            message = "metrics=true: a TrainJob's patches add no container; choose runner=job"
            raise ValueError(message)
        return self

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


class EmbedValues(Config):
    """The job that turns shards into vectors."""

    pods: int = Field(8, ge=1)
    shards: str | None = None
    """A dataset; none: the first one of the training."""
    gpu: bool = False
    """Whether each pod has one."""
    cpu: str = Field("4", pattern=_QUANTITY)
    memory: str = Field("8Gi", pattern=_QUANTITY)


class ServeValues(Config):
    """The server."""

    bundle: str = "s3://example-bucket/bundles/clip"
    fingerprint: str = Field("0" * 64, pattern=r"^[0-9a-f]{64}$")
    """What `vlm bundle push` printed."""
    collection: str = Field("clip", pattern=r"^[a-z0-9][a-z0-9-]{0,26}$")
    """Folder of the index volume, or prefix in Milvus; a collection holds one model's vectors."""
    milvus: str | None = Field(None, pattern=r"^https?://[^/@\s]+$")
    """Address of a Milvus; none: LanceDB in the index volume."""
    min_replicas: int = Field(2, ge=1)
    max_replicas: int = Field(10, ge=1)
    cpu: str = Field("2", pattern=_QUANTITY)
    memory: str = Field("4Gi", pattern=_QUANTITY)
    storage_class: str | None = None
    index: str = Field("20Gi", pattern=_QUANTITY)

    @model_validator(mode="after")
    def _range(self) -> "ServeValues":
        if self.max_replicas < self.min_replicas:
            message = (
                f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}"
            )
            raise ValueError(message)
        return self


class ClusterValues(Config):
    """One cluster: names, sizes and addresses."""

    namespace: str = Field("vlm", pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")
    images: Images = Images()
    train: TrainValues = TrainValues()
    embed: EmbedValues = EmbedValues()
    serve: ServeValues = ServeValues()
