"""Files of a run: events, tensors with a header, a client's personal state."""

__all__ = ["events", "files", "personal"]
