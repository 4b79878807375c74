"""What to evaluate, as configuration."""

from pydantic import Field

from vlm.config import Config

__all__ = ["EvaluationConfig", "GeometryTask", "RetrievalTask", "ZeroShotTask"]


class ZeroShotTask(Config):
    """Classify the images of a dataset; its classes are the values of one metadata field."""

    shards: str
    """A dataset folder, relative to the current one, or the URL of one."""
    class_field: str
    """Key in a sample's `.json` that tells its class."""
    prompts: list[str] = Field(default=["{text}"], min_length=1)
    """Prompts of a class; `{text}` is the caption of its first sample, `{tags}` its tags."""


class RetrievalTask(Config):
    """Find captions by images and images by captions."""

    shards: str
    group_field: str | None = None
    """Samples with equal values here are positives of each other; none: only own pairs."""


class GeometryTask(Config):
    """Measure where the modalities lie."""

    shards: str
    group_field: str | None = None
    """Samples with equal values here are no strangers: their distances are left out of the
    relative gap and the cross-uniformity; none: every sample is its own group."""


class EvaluationConfig(Config):
    """Named tasks of each kind."""

    zero_shot: dict[str, ZeroShotTask] = {}
    retrieval: dict[str, RetrievalTask] = {}
    geometry: dict[str, GeometryTask] = {}
    seed: int = 0

    def folders(self) -> list[str]:
        """The datasets that the tasks need, each once, in the order of first mention."""
        named = [
            *(task.shards for task in self.zero_shot.values()),
            *(task.shards for task in self.retrieval.values()),
            *(task.shards for task in self.geometry.values()),
        ]
        return list(dict.fromkeys(named))
