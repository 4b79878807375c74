"""The kinds of tasks: one file each, and one member of the union."""

from typing import Annotated

from pydantic import Field

from vlm.evaluation.tasks.arithmetic import ArithmeticResult, ArithmeticTask
from vlm.evaluation.tasks.base import Context, Outcome, TaskResult
from vlm.evaluation.tasks.captioning import CaptioningResult, CaptioningTask
from vlm.evaluation.tasks.corrected import CorrectedResult, CorrectedTask
from vlm.evaluation.tasks.few_shot import FewShotResult, FewShotTask
from vlm.evaluation.tasks.geometry import GeometryResult, GeometryTask, measure_geometry
from vlm.evaluation.tasks.mixed import MixedResult, MixedTask
from vlm.evaluation.tasks.retrieval import Recall, RetrievalResult, RetrievalTask, recall
from vlm.evaluation.tasks.zero_shot import ZeroShotResult, ZeroShotTask, zero_shot_accuracy

__all__ = [
    "ArithmeticResult",
    "ArithmeticTask",
    "CaptioningResult",
    "CaptioningTask",
    "Context",
    "CorrectedResult",
    "CorrectedTask",
    "FewShotResult",
    "FewShotTask",
    "GeometryResult",
    "GeometryTask",
    "MixedResult",
    "MixedTask",
    "Outcome",
    "Recall",
    "Result",
    "RetrievalResult",
    "RetrievalTask",
    "Task",
    "TaskResult",
    "ZeroShotResult",
    "ZeroShotTask",
    "measure_geometry",
    "recall",
    "zero_shot_accuracy",
]

Task = Annotated[
    ZeroShotTask
    | RetrievalTask
    | FewShotTask
    | ArithmeticTask
    | CaptioningTask
    | CorrectedTask
    | MixedTask
    | GeometryTask,
    Field(discriminator="type"),
]
Result = Annotated[
    ZeroShotResult
    | RetrievalResult
    | FewShotResult
    | ArithmeticResult
    | CaptioningResult
    | CorrectedResult
    | MixedResult
    | GeometryResult,
    Field(discriminator="type"),
]
