"""What of ours torch's compile caches must not overlook."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .. import templates


def _digest() -> str:
    digest = hashlib.sha256()
    for text in templates.texts():
        digest.update(text)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


CACHE_SALT = _digest()
"""Digest of every template and of the lowering that fills them.

Torch's caches key a graph by its operators and their arguments; our texts are neither, so a changed template would be
served old code. This travels among the operator's arguments."""
