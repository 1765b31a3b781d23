"""The errors that users see. Each says which argument, what was expected, what came, and what to do."""

from __future__ import annotations


class ParallaxError(Exception):
    """Base of every error that the package raises on purpose."""


class InputError(ParallaxError, ValueError):
    """An argument has a value, shape, device or combination that the call cannot mean."""


class InputTypeError(ParallaxError, TypeError):
    """An argument is of the wrong type: a mod where the probe goes, a mod of wrong arity, mixed dtypes."""


class UnsupportedError(ParallaxError, NotImplementedError):
    """The compiled path does not cover this call; the message names what does (usually the uncompiled reference)."""


class StoreError(ParallaxError, OSError):
    """The store of tuned candidates, or a file to import into it, cannot be read or written."""
