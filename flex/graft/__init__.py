"""Choosing a client's grafts on its own data: calibration, sums over layers, the choice, and its pictures."""

__all__ = ["calibrate", "choice", "choose", "show", "sums"]
