"""Figures that people can trust: zero-shot, retrieval, geometry, one report."""

from vlm.evaluation.geometry import Geometry, measure_geometry
from vlm.evaluation.report import print_summary, write_report
from vlm.evaluation.retrieval import Recall, RetrievalResult, recall
from vlm.evaluation.run import Evaluation, embed_dataset, evaluate, modality_means
from vlm.evaluation.tasks import EvaluationConfig
from vlm.evaluation.zero_shot import ZeroShotResult, zero_shot_accuracy

__all__ = [
    "Evaluation",
    "EvaluationConfig",
    "Geometry",
    "Recall",
    "RetrievalResult",
    "ZeroShotResult",
    "embed_dataset",
    "evaluate",
    "measure_geometry",
    "modality_means",
    "print_summary",
    "recall",
    "write_report",
    "zero_shot_accuracy",
]
