"""All settings of the server, typed; a YAML file holds them, the environment only its path."""

import os
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, field_validator

from vlm.config import Config, load_config

__all__ = ["ServingSettings", "load_settings"]

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
CONFIG_VARIABLE: Final = "VLM_SERVING_CONFIG"


class ServingSettings(Config):
    """What to serve, where, and within which limits."""

    bundle: Path = Path("runs/demo/bundle")
    index: Path = Path("runs/demo/index")
    """Folder of the searchable collection; made if it is missing."""
    label_sets: Path | None = None
    """Folder of stored label sets; none: `INDEX-label-sets`, beside the collection."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    device: str = "cpu"
    runtime: Literal[
        "auto", "torch-fp32", "torch-bf16", "openvino-fp32", "openvino-bf16", "openvino-int8"
    ] = "torch-fp32"
    """What computes. `auto` measures at the first start and takes the fastest of those that pass
    the parity gate; any but `torch-fp32` must pass it."""
    models: Path | None = None
    """Folder of further bundles, each in a folder of its name; `load` takes from here."""
    preload: list[str] = []
    """Those of them that are served from the start, beside `bundle`."""
    runtimes: Path | None = None
    """Folder of exported runtimes and their figures; none: `runtimes` beside the bundle."""
    api_key_sha256: list[str] = []
    """SHA-256, in hex, of each key that may be used; with none, no key is asked for."""
    allowed_hosts: list[str] = []
    """Names under which requests may come (without port); with none, any name, but on a loopback
    address only loopback names, so that no web page can reach it through a name of its own."""
    max_body_bytes: int = Field(32 * 2**20, ge=1024)
    max_total_body_bytes: int = Field(256 * 2**20, ge=1024)
    """Bodies of all requests in flight together; more are refused with 503."""
    max_image_pixels: int = Field(50_000_000, ge=1)
    max_images: int = Field(64, ge=1)
    """Images or texts in one request."""
    max_labels: int = Field(2000, ge=1)
    max_calibration_images: int = Field(1000, ge=2)
    """Labelled images in one calibration."""
    max_text_characters: int = Field(2000, ge=1)
    max_batch: int = Field(32, ge=1)
    """Most images or texts of one forward pass."""
    max_waiting: int = Field(512, ge=1)
    """Images or texts that may wait for the model; more are refused with 503."""
    cache_bytes: int = Field(64 * 2**20, ge=0)
    """Rows of texts and images that are remembered, of all models together; 0: none."""
    request_seconds: float = Field(60, gt=0)
    """How long a request may take before it is given up with 504; a client may ask for less."""
    decode_threads: int = Field(2, ge=1)
    ready_seconds: float = Field(10, gt=0)
    """How long the model may take to answer `/readyz`."""
    drain_seconds: int = Field(20, ge=0)
    """How long requests in flight may take after SIGTERM."""

    @property
    def label_sets_folder(self) -> Path:
        """Where label sets are stored."""
        return self.label_sets or self.index.with_name(f"{self.index.name}-label-sets")

    @property
    def host_names(self) -> frozenset[str]:
        """The names that a request may be addressed to; empty if any."""
        if self.allowed_hosts or self.host not in _LOOPBACK:
            return frozenset(self.allowed_hosts)
        return _LOOPBACK

    @field_validator("api_key_sha256")
    @classmethod
    def _are_hex_digests(cls, values: list[str]) -> list[str]:
        for value in values:
            if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
                message = "each entry must be 64 hex digits: printf %s KEY | sha256sum"
                raise ValueError(message)
        return values


def load_settings(overrides: list[str]) -> ServingSettings:
    """Settings from the file that `VLM_SERVING_CONFIG` names, if set, and overrides.

    Raises:
        ConfigError: If the file cannot be read or a value is wrong.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    return load_config(ServingSettings, Path(path) if path else None, overrides)
