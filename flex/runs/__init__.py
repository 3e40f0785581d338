"""A run on one machine: every method and seed of a configuration, resumable at any moment."""

__all__ = ["job", "progress", "run", "workers", "world"]
