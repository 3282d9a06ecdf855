"""Trained networks of other projects in and out, to the last digit."""

from undiffuse.interop._weights import Imported, mean_only

__all__ = ["Imported", "mean_only"]
