"""Everything measured on one GPU machine, beside every peer: `python -m benchmarks.gpu`."""
