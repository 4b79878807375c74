"""What leaves training: bundles, encoders and zero-shot classification."""

from vlm.inference.bundle import (
    Bundle,
    BundleInfo,
    ModalityMeans,
    load_bundle,
    read_bundle_info,
    save_bundle,
)
from vlm.inference.encoder import Encoder
from vlm.inference.zero_shot import (
    class_embeddings,
    exclusive_probabilities,
    fill_templates,
    independent_probabilities,
    normalised,
)

__all__ = [
    "Bundle",
    "BundleInfo",
    "Encoder",
    "ModalityMeans",
    "class_embeddings",
    "exclusive_probabilities",
    "fill_templates",
    "independent_probabilities",
    "load_bundle",
    "normalised",
    "read_bundle_info",
    "save_bundle",
]
