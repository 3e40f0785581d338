"""Measurements beside the strongest peers: `pytest benchmarks`, `python -m benchmarks.{aot,gpu,knowledge,study}`."""
