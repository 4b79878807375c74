"""What a person decides about the cluster: `k8s/values.yaml`."""

from typing import Literal

from pydantic import Field, model_validator

from vlm.config import Config

__all__ = ["ClusterValues", "ServeValues", "TrainValues"]

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
    storage_class: str | None = None
    data: str = Field("100Gi", pattern=_QUANTITY)
    runs: str = Field("100Gi", pattern=_QUANTITY)

    @model_validator(mode="after")
    def _a_rank_a_gpu(self) -> "TrainValues":
        if self.gpus_per_node not in (0, self.ranks_per_node):
            message = (
                f"gpus_per_node={self.gpus_per_node} and ranks_per_node={self.ranks_per_node}: "
                f"each rank drives one GPU, so give equal numbers, or gpus_per_node=0 for CPUs"
            )
            raise ValueError(message)
        return self

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


class ServeValues(Config):
    """The server."""

    bundle: str = "s3://example-bucket/bundles/clip"
    fingerprint: str = Field("0" * 64, pattern=r"^[0-9a-f]{64}$")
    """What `vlm bundle push` printed."""
    collection: str = Field("clip", pattern=r"^[a-z0-9][a-z0-9-]*$")
    """Folder of the index volume; a collection holds one model's vectors."""
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
    serve: ServeValues = ServeValues()
