"""Where the checkpoints of a run are kept: a folder that all ranks share, or an object store.

A store knows no renaming. There `checkpoint.json` is written last, and an object appears whole or
not at all, so that a checkpoint without it is none.

    s3://bucket/runs/<name>/step-00000500/
        model-NNNNN.safetensors …   as in a folder
        checkpoint.json             the last to come
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from vlm.data.cache import locked
from vlm.data.object_store import MissingObjectError, ObjectStore, RemoteConfig
from vlm.errors import CheckpointError, VlmError
from vlm.files import write_text_whole
from vlm.train.config import TrainConfig

__all__ = ["INFO", "FolderPlace", "Place", "StorePlace", "checkpoint_place"]

INFO: Final = "checkpoint.json"


@runtime_checkable
class Place(Protocol):
    """Checkpoints by step. While one is made its ranks leave notes for rank 0."""

    advice: str
    """What to do when a checkpoint cannot be written."""
    pause_seconds: float
    """Between two looks at the notes."""

    def steps(self) -> list[int]:
        """Of all whole checkpoints, the oldest first."""
        ...

    def name_of(self, step: int) -> str:
        """For people."""
        ...

    def fetch(self, step: int) -> Path:
        """A folder of this machine with the files of a whole checkpoint.

        Raises:
            CheckpointError: If a file is missing or was altered, where that is noticed here.
            StoreError: If a store does not answer.
        """
        ...

    def set_aside(self, step: int) -> None:
        """Keep a damaged checkpoint, but not as one."""
        ...

    def remove(self, step: int) -> None: ...

    def begin(self, step: int) -> None:
        """Clear what an earlier try at this checkpoint left; rank 0 calls it, before the others."""
        ...

    def draft(self, step: int) -> Path:
        """A folder of this machine in which this rank writes its files."""
        ...

    def hand_in(self, step: int, files: Sequence[str], *, note: str, text: str) -> None:
        """Put files of the draft where the checkpoint will be, then the note."""
        ...

    def notes(self, step: int) -> set[str]:
        """Names of all notes so far."""
        ...

    def note(self, step: int, name: str) -> str:
        """The text of a note."""
        ...

    def publish(self, step: int, info: str) -> None:
        """Make what was handed in a whole checkpoint; `info` goes into `checkpoint.json`."""
        ...

    def give_up(self, step: int) -> None:
        """Remove the draft."""
        ...


class FolderPlace:
    """A folder that all ranks see."""

    advice = "free some space or set `output` to another disk, then resume"
    pause_seconds = 0.01

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def steps(self) -> list[int]:
        return sorted(_step_of(path.parent.name) for path in self._folder.glob(f"step-*/{INFO}"))

    def name_of(self, step: int) -> str:
        return str(self._folder / _name(step))

    def fetch(self, step: int) -> Path:
        return self._folder / _name(step)

    def set_aside(self, step: int) -> None:
        aside = self._folder / f"damaged-{step:08d}"
        shutil.rmtree(aside, ignore_errors=True)
        self.fetch(step).rename(aside)

    def remove(self, step: int) -> None:
        shutil.rmtree(self.fetch(step))

    def begin(self, step: int) -> None:
        self.give_up(step)
        self._draft(step).mkdir(parents=True)

    def draft(self, step: int) -> Path:
        return self._draft(step)

    def hand_in(self, step: int, files: Sequence[str], *, note: str, text: str) -> None:
        write_text_whole(self._draft(step) / note, text)

    def notes(self, step: int) -> set[str]:
        return {path.name for path in self._draft(step).glob("[!.]*") if not path.suffix}

    def note(self, step: int, name: str) -> str:
        return (self._draft(step) / name).read_text(encoding="utf-8")

    def publish(self, step: int, info: str) -> None:
        draft = self._draft(step)
        for name in self.notes(step):
            (draft / name).unlink()
        write_text_whole(draft / INFO, info)
        shutil.rmtree(self.fetch(step), ignore_errors=True)
        draft.rename(self.fetch(step))

    def give_up(self, step: int) -> None:
        shutil.rmtree(self._draft(step), ignore_errors=True)

    def _draft(self, step: int) -> Path:
        return self._folder / f".draft-{step:08d}"


class StorePlace:
    """A folder in an object store.

    Args:
        url: Of the run's checkpoints.
        scratch: A folder for drafts; need not be seen by other ranks.
        config: Patience, and the cache into which checkpoints are fetched.
    """

    advice = "older checkpoints are in the store; resume when it takes more"
    pause_seconds = 0.5

    def __init__(self, url: str, *, scratch: Path, config: RemoteConfig) -> None:
        self._store = ObjectStore(url, config)
        self._scratch = scratch
        self._draft: Path | None = None
        key = hashlib.sha256(url.encode()).hexdigest()[:32]
        self._cache = config.cache.expanduser() / "checkpoints" / key

    def __str__(self) -> str:
        return self._store.url

    def steps(self) -> list[int]:
        folders = [name for name in self._store.folders() if name.startswith("step-")]
        return sorted(_step_of(name) for name in folders if INFO in self._store.sizes(name))

    def name_of(self, step: int) -> str:
        return f"{self._store.url}/{_name(step)}"

    def fetch(self, step: int) -> Path:
        """Download what is not here yet; other checkpoints of the run leave the cache."""
        self._cache.mkdir(parents=True, exist_ok=True)
        folder = self._cache / _name(step)
        with locked(self._cache / ".lock"):
            for other in self._cache.glob("step-*"):
                if other != folder:
                    shutil.rmtree(other)
            folder.mkdir(exist_ok=True)
            try:
                text = self._store.whole(f"{_name(step)}/{INFO}")
                files = dict(json.loads(text)["files"])
                present = self._store.sizes(_name(step))
                for name, (size, digest) in files.items():
                    self._fetch(step, name, size, digest, present.get(name), folder)
            except (ValueError, KeyError, TypeError, MissingObjectError) as error:
                message = f"{self.name_of(step)}: damaged ({error})"
                raise CheckpointError(message) from error
            (folder / INFO).write_bytes(text)
        return folder

    def _fetch(
        self, step: int, name: str, size: int, digest: str, present: int | None, folder: Path
    ) -> None:
        if "/" in name:
            message = f"{name} is no name of a file"
            raise ValueError(message)
        if present != size:
            found = "is missing" if present is None else f"has {present} bytes, not {size}"
            message = f"{name} {found}"
            raise ValueError(message)
        if not self._store.download(f"{_name(step)}/{name}", size, digest, folder / name):
            message = f"{name} was altered since it was written"
            raise ValueError(message)

    def set_aside(self, step: int) -> None:
        """Without `checkpoint.json`, which is kept under another name."""
        text = self._store.whole(f"{_name(step)}/{INFO}")
        self._store.put(f"{_name(step)}/damaged.json", text)
        self._store.delete([f"{_name(step)}/{INFO}"])

    def remove(self, step: int) -> None:
        self._clear(_name(step))

    def begin(self, step: int) -> None:
        for left in self._scratch.glob(".draft-*"):
            shutil.rmtree(left)
        self._clear(_name(step))

    def draft(self, step: int) -> Path:
        if self._draft is None:  # of this rank alone
            self._scratch.mkdir(parents=True, exist_ok=True)
            self._draft = Path(tempfile.mkdtemp(prefix=f".draft-{step:08d}-", dir=self._scratch))
        return self._draft

    def hand_in(self, step: int, files: Sequence[str], *, note: str, text: str) -> None:
        folder = self.draft(step)
        for name in files:
            self._store.put(f"{_name(step)}/{name}", folder / name)
            (folder / name).unlink()
        self._remove_draft()
        self._store.put(f"{_name(step)}/{note}", text.encode())

    def notes(self, step: int) -> set[str]:
        return {name for name in self._store.sizes(_name(step)) if "." not in name}

    def note(self, step: int, name: str) -> str:
        return self._store.whole(f"{_name(step)}/{name}").decode()

    def publish(self, step: int, info: str) -> None:
        self._store.put(f"{_name(step)}/{INFO}", info.encode())
        self._store.delete([f"{_name(step)}/{name}" for name in self.notes(step)])

    def give_up(self, step: int) -> None:
        self._remove_draft()
        with contextlib.suppress(VlmError):  # what stays is no checkpoint
            self._clear(_name(step))

    def _remove_draft(self) -> None:
        if self._draft is not None:
            shutil.rmtree(self._draft, ignore_errors=True)
        self._draft = None

    def _clear(self, folder: str) -> None:
        # What makes it a checkpoint goes first.
        names = sorted(self._store.sizes(folder), key=lambda name: name != INFO)
        self._store.delete([f"{folder}/{name}" for name in names])


def checkpoint_place(config: TrainConfig) -> Place:
    """Where a run keeps its checkpoints.

    Raises:
        DataError: If `config.checkpoints` names no store.
    """
    folder = config.run_folder / "checkpoints"
    if config.checkpoints is None:
        return FolderPlace(folder)
    url = f"{config.checkpoints.rstrip('/')}/{config.name}"
    return StorePlace(url, scratch=folder, config=config.data.remote)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))
