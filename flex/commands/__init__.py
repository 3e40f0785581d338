"""What the commands of `cli.py` do. Each takes plain values, prints to the terminal, and returns the exit code."""

__all__ = ["anchors", "export", "graft", "report", "saved", "train"]
