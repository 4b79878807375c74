"""The threads that all models of one server share."""

from concurrent.futures import ThreadPoolExecutor

from serving.turns import Turns

__all__ = ["Workers"]


class Workers:
    """A few threads decode images and tokenize texts; others compute, whichever model it is for.

    Args:
        decode_threads: Start when they are first needed, as all do.
    """

    def __init__(self, decode_threads: int) -> None:
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self.decoding = Turns(self._decoders, decode_threads)
        """Clients take turns in the threads that decode."""
        self._devices: dict[int, ThreadPoolExecutor] = {}

    def device(self, streams: int) -> ThreadPoolExecutor:
        """The threads of all models that compute so many batches at once, one thread for each."""
        if streams not in self._devices:
            self._devices[streams] = ThreadPoolExecutor(streams, thread_name_prefix="model")
        return self._devices[streams]

    def close(self) -> None:
        """Finish what is running, forget what was not begun, and end the threads."""
        for executor in (self._decoders, *self._devices.values()):
            executor.shutdown(cancel_futures=True)
