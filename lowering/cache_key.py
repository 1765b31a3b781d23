"""What of ours torch's compile caches must not overlook."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .. import templates
from ..version import __version__
from . import tuned
from .torch_compat_errors import settled_when_traced


def _digest() -> str:
    digest = hashlib.sha256(__version__.encode())
    for text in templates.texts():
        digest.update(text)
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("*.py"), *folder.glob("*.json")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


CACHE_SALT = _digest()
"""Digest of the package's version, of every template and of the lowering that fills them.

Torch's caches key a graph by its operators and their arguments; our texts are neither, so a changed template would be
served old code. This travels among the operator's arguments."""


def cache_salt() -> str:
    """:data:`CACHE_SALT` and the state of the store of tuned candidates, so that a new winner is not passed over by old code.

    Settled when a call is traced: a function that is compiled keeps its kernels until ``torch.compiler.reset()``.
    """
    return settled_when_traced(_salt)


def _salt() -> str:
    return f"{CACHE_SALT}-{tuned.store().fingerprint()}"
