"""The demo's world: a small language of skills, five clients with conventions of their own, and a pretrained base."""

__all__ = ["data", "language"]
