"""The server's folder of `vlm k8s render`."""

from vlm.cli.k8s_parts import Tree, dump, kustomization_of, manifest, storage
from vlm.cli.k8s_values import ClusterValues, ServeValues

__all__ = ["render_serving", "store_settings"]


def render_serving(values: ClusterValues, *, base: str) -> dict[str, str]:
    """Files of a kustomization, by name; see `render_training`."""
    serve = values.serve
    container = {
        "name": "serve",
        "resources": {
            "requests": {"cpu": serve.cpu, "memory": serve.memory},
            "limits": {"memory": serve.memory},
        },
    }
    deployment = manifest("apps/v1", "Deployment", "serve") | {
        "spec": {"template": {"spec": {"containers": [container]}}}
    }
    scaler = manifest("autoscaling/v2", "HorizontalPodAutoscaler", "serve") | {
        "spec": {"minReplicas": serve.min_replicas, "maxReplicas": serve.max_replicas}
    }
    settings = {
        "bundle": "/models/bundle",
        "index": f"/index/{serve.collection}",
        "runtimes": "/tmp/runtimes",
        "host": "0.0.0.0",
        "port": 8000,
        "drain_seconds": 20,
        **store_settings(serve),
    }
    address = [f"BUNDLE_URL={serve.bundle}", f"BUNDLE_FINGERPRINT={serve.fingerprint}"]
    kustomization = kustomization_of(values) | {
        "resources": [f"{base}/serve"],
        "components": [f"{base}/components/milvus"] if serve.milvus else [],
        "configMapGenerator": [
            {"name": "serve-config", "behavior": "replace", "files": ["serving.yaml"]},
            {"name": "serve-bundle", "behavior": "replace", "literals": address},
        ],
        "patches": [
            {"path": "size.yaml"},
            {"path": "scale.yaml"},
            *storage("serve-index", serve.index, serve.storage_class),
        ],
    }
    return {
        "kustomization.yaml": dump(kustomization),
        "size.yaml": dump(deployment),
        "scale.yaml": dump(scaler),
        "serving.yaml": dump(settings),
    }


def store_settings(serve: ServeValues) -> Tree:
    """The keys of the server's settings that say where vectors are; none: in the index volume."""
    if serve.milvus is None:
        return {}
    store = {
        "type": "milvus",
        "uri": serve.milvus,
        "token_file": "/run/secrets/milvus/token",
        # A collection holds one model's vectors, so each model has its own names in the cluster.
        "prefix": f"vlm_{serve.collection.replace('-', '_')}_",
    }
    return {"store": store}
