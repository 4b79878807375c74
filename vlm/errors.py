"""Every error a user can act on.

VlmError
├── ConfigError      a key or value in a YAML file or an override
├── DataError        a shard, a sample, a caption table, a download
├── StoreError       an object store that does not answer, though asked again and again
├── CheckpointError  a checkpoint that cannot be saved or resumed
└── BundleError      an exported bundle that cannot be read or trusted

A message says where, what was found, what was allowed and what to do. The command line prints it
without a traceback; a caller's programming mistake stays a `ValueError`.
"""

__all__ = [
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "StoreError",
    "VlmError",
]


class VlmError(Exception):
    """Base of all errors that a person using vlm can fix."""


class ConfigError(VlmError):
    """A configuration file or override that does not describe a valid run."""


class DataError(VlmError):
    """Input data that is missing, damaged or not of the promised form."""


class StoreError(VlmError):
    """A store that is out of reach for now; what it holds may be good, so nothing is replaced."""


class CheckpointError(VlmError):
    """A checkpoint that cannot be written, read or matched to this run."""


class BundleError(VlmError):
    """A bundle that is incomplete, altered or of another format version."""
