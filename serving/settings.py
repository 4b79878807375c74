"""All settings of the server, typed; a YAML file holds them, the environment only its path."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from vlm.config import Config, load_config
from vlm.files import is_url

__all__ = [
    "ApiKey",
    "EmbeddedStoreConfig",
    "MilvusStoreConfig",
    "RemoteImages",
    "Scope",
    "ServingSettings",
    "hand_to_workers",
    "load_settings",
    "settings_folder",
]

_MOST_STREAMS: Final = 2
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
CONFIG_VARIABLE: Final = "VLM_SERVING_CONFIG"


def _place(value: Path | str) -> Path | str:
    return Path(value) if isinstance(value, str) and not is_url(value) else value


Scope = Literal["read", "write", "admin"]
Place = Annotated[str | Path, AfterValidator(_place)]
"""A folder, or the URL of a place in an object store (`s3://`, `gs://`, `az://`, `https://`)."""


class ApiKey(Config):
    """A key that may be used, kept as its digest; none of the scopes holds another."""

    name: str = Field(pattern="^[A-Za-z0-9._-]{1,64}$")
    """What logs and queues call who uses it."""
    sha256: str
    """Of the key, in hex: printf %s KEY | sha256sum. Make keys long and random."""
    scopes: list[Scope] = ["read"]
    """`read`: ask; `write`: change the collection and label sets; `admin`: load and unload."""
    requests_per_minute: float | None = Field(None, gt=0)
    """More are refused with 429; each worker process counts for itself."""
    burst: int = Field(10, ge=1)
    """How many may come at once, within that rate."""

    @field_validator("sha256")
    @classmethod
    def _is_hex_digest(cls, value: str) -> str:
        return _hex_digest(value)


class RemoteImages(Config):
    """Which images of other servers may be fetched for a request."""

    schemes: list[Literal["https", "http"]] = ["https"]
    ports: list[int] = [443]
    hosts: list[str] = []
    """Names that may be asked; none: any on the public internet."""
    max_bytes: int = Field(10 * 2**20, ge=1)
    max_redirects: int = Field(3, ge=0, le=10)
    seconds: float = Field(5, gt=0)
    """For all of one image, redirects included."""


class EmbeddedStoreConfig(Config):
    """Collections in folders: `index` and `collections`."""

    type: Literal["embedded"] = "embedded"


class MilvusStoreConfig(Config):
    """Collections in a Milvus cluster, with all that is known of them.

    `shards` and `index` are of collections that are made from now on; others stay as they are.
    """

    type: Literal["milvus"] = "milvus"
    uri: str
    """E.g. `http://milvus:19530`; https for TLS."""
    token_file: Path | None = None
    """A file with `user:password` or a token, which is never put into settings or logs."""
    database: str = "default"
    prefix: str = Field("vlm_", pattern="^[A-Za-z_][A-Za-z0-9_]{0,31}$")
    """What names in the cluster begin with; servers with the same one share collections."""
    shards: int = Field(1, ge=1, le=16)
    """Channels that writes are dealt out to. With several, a crash of the cluster may keep a part
    of the one write it was amid."""
    replicas: int = Field(1, ge=1, le=64)
    """Copies in memory, each on query nodes of its own; one that is loaded keeps its number."""
    index: Literal["ivf_flat", "flat"] = "ivf_flat"
    """Those kinds that exact search is possible with, so that recall can be measured."""
    consistency: Literal["session", "strong"] = "session"
    """Whether a read waits for what its own process has written, or for what any has."""
    timeout_seconds: float = Field(30, gt=0)

    @model_validator(mode="after")
    def _has_no_password(self) -> "MilvusStoreConfig":
        if not re.fullmatch(r"https?://[^/@\s]+/?", self.uri):  # and what was found is not told
            message = "uri must be http://HOST:PORT or https://…; a password belongs in token_file"
            raise ValueError(message)
        return self


StoreConfig = Annotated[EmbeddedStoreConfig | MilvusStoreConfig, Field(discriminator="type")]


class ServingSettings(Config):
    """What to serve, where, and within which limits."""

    bundle: Place = Path("runs/demo/bundle")
    bundle_cache: Path = Path("~/.cache/vlm/bundles")
    """Folder of bundles that were fetched from an object store, by fingerprint."""
    index: Path = Path("runs/demo/index")
    """Folder of the searchable collection; made if it is missing."""
    store: StoreConfig = EmbeddedStoreConfig()
    """What keeps the collections."""
    collections: Path | None = None
    """Folder of further collections and of aliases; none: `INDEX-collections`, beside it."""
    recall_target: float = Field(0.95, gt=0, le=1)
    """Share of the 10 nearest items that an index must find, of each kind of query."""
    exact_below: int = Field(20_000, ge=1)
    """Of fewer items, all or those that a filter leaves, every one is compared."""
    label_sets: Path | None = None
    """Folder of stored label sets; none: `INDEX-label-sets`, beside the collection."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    workers: int = Field(1, ge=1, le=64)
    """Processes that share the port, for each device; each has its own models, queue, cache and
    rates, and models cannot be loaded over HTTP if there are several."""
    device: str = "cpu"
    devices: list[str] = []
    """As many processes as there are devices (times `workers`), each with a device of its own."""
    runtime: Literal[
        "auto",
        "torch-fp32",
        "torch-bf16",
        "openvino-fp32",
        "openvino-bf16",
        "openvino-mixed",
        "openvino-int8",
    ] = "torch-fp32"
    """What computes. `auto` measures at the first start and takes the fastest of those that pass
    the parity gate; any but `torch-fp32` must pass it."""
    streams: int | None = Field(None, ge=1, le=64)
    """Batches that OpenVINO computes at once, each on its share of the cores; none: as many as
    cores, at most 2. Torch computes one after the other."""
    models: Place | None = None
    """Folder or URL of further bundles, each in a folder of its name; `load` takes from here."""
    preload: list[str] = []
    """Those of them that are served from the start, beside `bundle`."""
    runtimes: Path | None = None
    """Folder of exported runtimes and their figures; none: `runtimes` beside the bundle."""
    api_key_sha256: list[str] = []
    """SHA-256, in hex, of keys that may ask and write, without a name or a limit of their own."""
    keys: list[ApiKey] = []
    """Keys with names, scopes and rates; with none of either, no key is asked for."""
    allowed_hosts: list[str] = []
    """Names under which requests may come (without port); with none, any name, but on a loopback
    address only loopback names, so that no web page can reach it through a name of its own."""
    remote_images: RemoteImages | None = None
    """Images by address; none, the default: refused."""
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
    head_seconds: float = Field(10, gt=0)
    """How long a connection may take to bring the headers of a request; then it is closed."""
    decode_threads: int = Field(2, ge=1)
    log_format: Literal["text", "json"] = "text"
    access_log: bool = False
    """Whether each request is logged: method, route, status, client, time; no payload."""
    traces: str | None = None
    """Where OpenTelemetry's spans go, e.g. `http://localhost:4318/v1/traces`."""
    ready_seconds: float = Field(10, gt=0)
    """How long the model may take to answer `/readyz`."""
    drain_seconds: int = Field(20, ge=0)
    """How long requests in flight may take after SIGTERM."""

    @property
    def processes(self) -> int:
        """How many share the port."""
        return self.workers * max(1, len(self.devices))

    @property
    def streams_here(self) -> int:
        """Batches at once in each of the processes."""
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return self.streams or max(1, min(_MOST_STREAMS, cores // self.processes))

    def on_device(self, place: int) -> "ServingSettings":
        """What the process in a place, from 0, does: its device is that of its place."""
        if not self.devices:
            return self
        return self.model_copy(update={"device": self.devices[place % len(self.devices)]})

    @property
    def collections_folder(self) -> Path:
        """Where further collections are stored."""
        return self.collections or self.index.with_name(f"{self.index.name}-collections")

    @property
    def label_sets_folder(self) -> Path:
        """Where label sets are stored."""
        return self.label_sets or self.index.with_name(f"{self.index.name}-label-sets")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in _LOOPBACK

    @property
    def host_names(self) -> frozenset[str]:
        """The names that a request may be addressed to; empty if any."""
        if self.allowed_hosts or not self.is_loopback:
            return frozenset(self.allowed_hosts)
        return _LOOPBACK

    @field_validator("api_key_sha256")
    @classmethod
    def _are_hex_digests(cls, values: list[str]) -> list[str]:
        return [_hex_digest(value) for value in values]


def settings_folder() -> Path:
    """Where a process finds what `hand_to_workers` has written."""
    return Path(os.environ[CONFIG_VARIABLE]).parent


def hand_to_workers(settings: ServingSettings, folder: Path) -> None:
    """Write the settings where processes that start from now on read them."""
    path = folder / "settings.yaml"
    path.write_text(settings.model_dump_json(), encoding="utf-8")  # JSON is YAML too
    path.chmod(0o600)
    os.environ[CONFIG_VARIABLE] = str(path)


def _hex_digest(value: str) -> str:
    if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        message = "must be 64 hex digits: printf %s KEY | sha256sum"
        raise ValueError(message)
    return value


def load_settings(overrides: list[str]) -> ServingSettings:
    """Settings from the file that `VLM_SERVING_CONFIG` names, if set, and overrides.

    Raises:
        ConfigError: If the file cannot be read or a value is wrong.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    return load_config(ServingSettings, Path(path) if path else None, overrides)
