"""The threads that all models of one server share."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

__all__ = ["Workers", "start_workers"]


@dataclass(frozen=True, kw_only=True)
class Workers:
    """One thread computes, whichever model it is for; a few decode images and tokenize texts."""

    decoders: ThreadPoolExecutor
    device: ThreadPoolExecutor

    def close(self) -> None:
        """Finish what is running and end the threads."""
        self.decoders.shutdown()
        self.device.shutdown()


def start_workers(decode_threads: int) -> Workers:
    """Threads start when they are first needed."""
    return Workers(
        decoders=ThreadPoolExecutor(decode_threads, thread_name_prefix="decode"),
        device=ThreadPoolExecutor(1, thread_name_prefix="model"),
    )
