"""What leaves training: bundles, encoders and zero-shot classification."""

from vlm.inference.bundle import (
    Bundle,
    BundleInfo,
    ModalityMeans,
    bundle_fingerprint,
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
    NAMED_TEMPLATES,
    class_embeddings,
    doubled_label,
    exclusive_probabilities,
    expanded_templates,
    fill_templates,
    independent_probabilities,
    normalised,
)

__all__ = [
    "HUB_CANDIDATES",
    "HUB_SHARPNESS",
    "NAMED_TEMPLATES",
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
    "bundle_fingerprint",
    "cached_bundle",
    "class_embeddings",
    "crowding",
    "doubled_label",
    "exclusive_probabilities",
    "expanded_templates",
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
