"""What leaves training: bundles, encoders and zero-shot classification."""

from vlm.inference.bundle import (
    Bundle,
    BundleInfo,
    ModalityMeans,
    load_bundle,
    read_bundle_info,
    save_bundle,
    verify_bundle,
)
from vlm.inference.captioner import Captioner
from vlm.inference.encoder import Encoder
from vlm.inference.generate import (
    BeamSearch,
    ContrastiveSearch,
    GreedySearch,
    NucleusSampling,
    Strategy,
    generate,
)
from vlm.inference.hubs import HUB_CANDIDATES, HUB_SHARPNESS, crowding
from vlm.inference.transfer import cached_bundle, fetch_bundle, push_bundle, stored_bundles
from vlm.inference.zero_shot import (
    class_embeddings,
    exclusive_probabilities,
    fill_templates,
    independent_probabilities,
    normalised,
)

__all__ = [
    "HUB_CANDIDATES",
    "HUB_SHARPNESS",
    "BeamSearch",
    "Bundle",
    "BundleInfo",
    "Captioner",
    "ContrastiveSearch",
    "Encoder",
    "GreedySearch",
    "ModalityMeans",
    "NucleusSampling",
    "Strategy",
    "cached_bundle",
    "class_embeddings",
    "crowding",
    "exclusive_probabilities",
    "fetch_bundle",
    "fill_templates",
    "generate",
    "independent_probabilities",
    "load_bundle",
    "normalised",
    "push_bundle",
    "read_bundle_info",
    "save_bundle",
    "stored_bundles",
    "verify_bundle",
]
