"""Figures that people can trust: zero-shot, retrieval, few-shot, geometry and more, one report."""

from vlm.evaluation.config import EvaluationConfig
from vlm.evaluation.embed import (
    EmbeddedDataset,
    embed_dataset,
    embed_shards,
    embed_texts,
    modality_means,
)
from vlm.evaluation.model import (
    Subject,
    subject_of_bundle,
    subject_of_encoder,
    subject_of_open_clip,
)
from vlm.evaluation.page import write_report
from vlm.evaluation.run import (
    Comparison,
    Evaluation,
    Evidence,
    ModelFacts,
    compare,
    evaluate,
    evaluate_with_evidence,
)
from vlm.evaluation.summary import print_comparison, print_summary
from vlm.evaluation.tasks import recall, zero_shot_accuracy

__all__ = [
    "Comparison",
    "EmbeddedDataset",
    "Evaluation",
    "EvaluationConfig",
    "Evidence",
    "ModelFacts",
    "Subject",
    "compare",
    "embed_dataset",
    "embed_shards",
    "embed_texts",
    "evaluate",
    "evaluate_with_evidence",
    "modality_means",
    "print_comparison",
    "print_summary",
    "recall",
    "subject_of_bundle",
    "subject_of_encoder",
    "subject_of_open_clip",
    "write_report",
    "zero_shot_accuracy",
]
