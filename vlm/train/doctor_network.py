"""Whether what a run needs beyond its own machine is in reach, found out before it starts."""

import ipaddress
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from vlm.data.object_store import ObjectStore
from vlm.errors import VlmError
from vlm.train.config import TrainConfig

__all__ = ["Finding", "network_findings"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One verdict."""

    check: str
    verdict: Literal["ok", "warning", "problem"]
    text: str
    """What was found."""
    advice: str = ""
    """What to change."""
    figures: dict[str, float | int] = field(default_factory=dict)


def network_findings(config: TrainConfig, *, world_size: int) -> Iterator[Finding]:
    """Of the store for checkpoints, and of this host's name, by which other nodes call it."""
    if config.checkpoints is not None:
        yield _store(config.checkpoints, config)
    if world_size > 1:
        yield _host()


def _store(url: str, config: TrainConfig) -> Finding:
    """Write, list, read and remove a small object."""
    folder = f"doctor-{uuid.uuid4().hex}"
    try:
        store = ObjectStore(f"{url.rstrip('/')}/{config.name}", config.data.remote)
        store.put(f"{folder}/probe", b"probe")
        read = store.whole(f"{folder}/probe") if "probe" in store.sizes(folder) else b""
        store.delete([f"{folder}/probe"])
    except VlmError as error:
        return Finding(
            check="network", verdict="problem", text=str(error),
            advice="give write access to that folder in the environment, or another `checkpoints`",
        )  # fmt: skip
    if read != b"probe":
        text = f"{store.url}: an object just written is not there"
        return Finding(
            check="network", verdict="problem", text=text, advice="set another `checkpoints`"
        )
    text = f"{store.url}: an object was written, listed, read and removed"
    return Finding(check="network", verdict="ok", text=text)


def _host() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        text = f"this host is called {name}, which has no address ({error})"
        advice = f"one node is enough as it is; for several, let the name service know {name}"
        return Finding(check="host", verdict="warning", text=text, advice=advice)
    text = f"this host is called {name}, at {address}"
    if ipaddress.ip_address(address).is_loopback:
        text += ", where other nodes do not reach it; one node is enough as it is"
    return Finding(check="host", verdict="ok", text=text)
