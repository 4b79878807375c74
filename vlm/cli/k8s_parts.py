"""What the folders that `vlm k8s render` writes have in common."""

from typing import Any

import yaml

from vlm.cli.k8s_values import ClusterValues

__all__ = ["Tree", "dump", "kustomization_of", "manifest", "storage"]

Tree = dict[str, Any]


def storage(name: str, size: str, storage_class: str | None) -> list[Tree]:
    """A patch for the size and class of a PersistentVolumeClaim."""
    spec: Tree = {"resources": {"requests": {"storage": size}}}
    if storage_class is not None:
        spec["storageClassName"] = storage_class
    return [{"patch": dump(manifest("v1", "PersistentVolumeClaim", name) | {"spec": spec})}]


def kustomization_of(values: ClusterValues) -> Tree:
    """What every kustomization has: namespace and images."""
    images = []
    for name, image in (("vlm-train", values.images.train), ("vlm-serve", values.images.serve)):
        new_name, _, tag = image.rpartition(":")
        images.append({"name": name, "newName": new_name, "newTag": tag})
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": values.namespace,
        "images": images,
    }


def manifest(version: str, kind: str, name: str) -> Tree:
    """An object without a spec."""
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}}


def dump(tree: Any) -> str:
    """YAML in the order that keys were given."""
    return yaml.safe_dump(tree, sort_keys=False, width=100)
