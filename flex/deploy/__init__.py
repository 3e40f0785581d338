"""A run at several sites on Flower's engine: a worker at each site, a server without model or data, and what both need
to be set up."""

__all__ = ["door", "frames", "shim", "worker"]
