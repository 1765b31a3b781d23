"""The version, where everything of the package may read it."""

__version__ = "0.1.0"
