"""Choosing a client's grafts on its own data: calibration, sums over layers, the choice, and its pictures."""
