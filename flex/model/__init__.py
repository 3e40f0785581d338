"""The model of a job: the frozen base, what a method puts on it, and who owns which parameter."""

__all__ = ["adapters", "base", "compiled", "partition"]
