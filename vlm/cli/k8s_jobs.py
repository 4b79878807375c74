"""The folders of `vlm k8s render` between training and serving: export, embed, index."""

from typing import TYPE_CHECKING

from vlm.cli.k8s_parts import Tree, dump, kustomization_of, manifest
from vlm.cli.k8s_serving import store_settings
from vlm.cli.k8s_values import ClusterValues

if TYPE_CHECKING:
    from vlm.train import TrainConfig

__all__ = ["render_embedding", "render_export", "render_index"]


def render_export(training: "TrainConfig", values: ClusterValues, *, base: str) -> dict[str, str]:
    """Files of a kustomization, by name: the run's bundle goes to where the server fetches it."""
    work = {"RUN": str(training.run_folder), "BUNDLE_URL": values.serve.bundle}
    return {"kustomization.yaml": dump(_job(values, base, "export", work))}


def render_embedding(
    training: "TrainConfig", values: ClusterValues, *, base: str
) -> dict[str, str]:
    """Files of a kustomization, by name: the run's first source into Parquet."""
    embed = values.embed
    work = {
        "SHARDS": embed.shards or training.data.all_sources[0].shards,
        "OUT": _embeddings(training),
        "PODS": str(embed.pods),
        "BUNDLE_URL": values.serve.bundle,
        "BUNDLE_FINGERPRINT": values.serve.fingerprint,
    }
    limits = {"memory": embed.memory} | ({"nvidia.com/gpu": "1"} if embed.gpu else {})
    container = {
        "name": "embed",
        "resources": {"requests": {"cpu": embed.cpu, "memory": embed.memory}, "limits": limits},
    }
    size = manifest("batch/v1", "Job", "embed") | {
        "spec": {
            "completions": embed.pods,
            "parallelism": embed.pods,
            "template": {"spec": {"containers": [container]}},
        }
    }
    kustomization = _job(values, base, "embed", work) | {"patches": [{"path": "size.yaml"}]}
    return {"kustomization.yaml": dump(kustomization), "size.yaml": dump(size)}


def render_index(training: "TrainConfig", values: ClusterValues, *, base: str) -> dict[str, str]:
    """Files of a kustomization, by name: embeddings into the collection that is served."""
    work = {
        "SOURCE": _embeddings(training),
        "BUNDLE": str(training.run_folder / "bundle"),
        "INDEX": f"/index/{values.serve.collection}",
    }
    if values.serve.milvus is None:
        return {"kustomization.yaml": dump(_job(values, base, "index", work))}
    work["INDEX"] = "/config/serving.yaml"  # whose store is meant
    kustomization = _job(values, base, "index-milvus", work)
    kustomization["configMapGenerator"] += [
        {"name": "index-store", "behavior": "replace", "files": ["serving.yaml"]}
    ]
    return {
        "kustomization.yaml": dump(kustomization),
        "serving.yaml": dump(store_settings(values.serve)),
    }


def _embeddings(training: "TrainConfig") -> str:
    return str(training.output / "embeddings" / training.name)


def _job(values: ClusterValues, base: str, folder: str, work: dict[str, str]) -> Tree:
    literals = [f"{name}={value}" for name, value in work.items()]
    name = folder.partition("-")[0]
    return kustomization_of(values) | {
        "resources": [f"{base}/{folder}"],
        "configMapGenerator": [
            {"name": f"{name}-work", "behavior": "replace", "literals": literals}
        ],
    }
