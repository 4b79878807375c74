"""What the services and stores refuse, without any notion of HTTP."""

__all__ = [
    "BadInputError",
    "ConflictError",
    "FingerprintError",
    "NotFoundError",
    "OverloadedError",
    "ServingError",
    "StoreUnavailableError",
]


class ServingError(Exception):
    """Base of all errors that a client of the server may see; the message is for the client."""


class BadInputError(ServingError):
    """An image, label or filter that cannot be used."""


class NotFoundError(ServingError):
    """No item, model or label set of that name."""


class ConflictError(ServingError):
    """Right in itself, but not in the state that the server is in."""


class OverloadedError(ServingError):
    """The queue is full; try again in a moment."""


class FingerprintError(ServingError):
    """Vectors of another model than the collection's."""


class StoreUnavailableError(ServingError):
    """What keeps the vectors does not answer, or refuses; try again in a moment."""
