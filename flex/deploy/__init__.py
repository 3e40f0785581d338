"""A run at several sites on Flower's engine: a worker at each site, a server without model or data, and what both need
to be set up."""

__all__ = [
    *("app_files", "certificates", "door", "folder", "frames", "grid", "job", "package", "processes", "progress"),
    *("record", "server_app", "shim", "simulated", "superlink", "units", "worker"),
]
