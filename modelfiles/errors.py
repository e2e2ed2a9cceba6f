"""What can go wrong with a model on disk.

    ModelFilesError
    ├── ModelNotFound            the source names nothing that exists
    ├── MalformedModel           a file is damaged, truncated or contradicts another
    │   └── DigestMismatch       bytes are not the ones that were asked for
    ├── UnsupportedModel         a valid model that needs something we do not have; names it
    ├── WeightsMismatch          tensors missing, unexpected or of the wrong shape
    ├── CacheError               the model cache cannot be written
    │   ├── NoDiskSpace          its disk is full
    │   └── CacheNotWritable     its folder belongs to somebody else
    └── FetchError               a download did not finish (retryable once its cause is gone)
        ├── OfflineError         the network is needed and was forbidden
        └── ClientMissing        no download client on this machine

Every message says what was found, where, and what to do about it.
"""

from __future__ import annotations


class ModelFilesError(Exception):
    """Root of the package's errors."""


class ModelNotFound(ModelFilesError):
    """The model source names no file, folder or known model."""


class MalformedModel(ModelFilesError):
    """A model file is damaged or contradicts another."""


class DigestMismatch(MalformedModel):
    """The bytes are not those that the digest names."""


class UnsupportedModel(ModelFilesError):
    """A valid model that needs a feature we do not have. The message names the feature."""


class WeightsMismatch(ModelFilesError):
    """The tensors on disk are not those that the config describes."""


class CacheError(ModelFilesError):
    """The model cache cannot be written."""


class NoDiskSpace(CacheError):
    """The disk that holds the model cache is full."""


class CacheNotWritable(CacheError):
    """The model cache's folder may not be written by this user."""


class FetchError(ModelFilesError):
    """A download did not finish. What was fetched is kept; trying again continues."""


class OfflineError(FetchError):
    """The files are not in the cache and the network is switched off."""


class ClientMissing(FetchError):
    """No download client (pip or uv) was found."""
