"""What to evaluate on what, as configuration."""

from pydantic import Field, model_validator

from vlm.config import Config
from vlm.evaluation.bootstrap import BootstrapConfig
from vlm.evaluation.datasets import Dataset
from vlm.evaluation.tasks import FewShotTask, Task

__all__ = ["EvaluationConfig"]


class EvaluationConfig(Config):
    """Datasets by name, and what is done with them."""

    datasets: dict[str, Dataset] = Field(min_length=1)
    """Each is embedded once, however many tasks name it."""
    tasks: list[Task] = Field(min_length=1)
    bootstrap: BootstrapConfig = BootstrapConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _names_are_known(self) -> "EvaluationConfig":
        for task in self.tasks:
            for name in _named(task):
                if name not in self.datasets:
                    message = (
                        f"task {task.type}: no dataset is called {name!r}; there are "
                        f"{', '.join(self.datasets)}"
                    )
                    raise ValueError(message)
        keys = [key for key, _ in self.by_key()]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            message = f"tasks {', '.join(twice)} come twice; give them different names"
            raise ValueError(message)
        return self

    def by_key(self) -> list[tuple[str, Task]]:
        """The tasks, each with the `kind/name` that it is known by."""
        return [(f"{task.type}/{task.label}", task) for task in self.tasks]

    def used_datasets(self) -> list[str]:
        """The names of the datasets that tasks need, each once, in the order of first mention."""
        return list(dict.fromkeys(name for task in self.tasks for name in _named(task)))

    def folders(self) -> list[str]:
        """Where the data lie."""
        return [str(self.datasets[name].location) for name in self.used_datasets()]


def _named(task: Task) -> list[str]:
    support = [task.support] if isinstance(task, FewShotTask) and task.support else []
    return [task.data, *support]
