"""A run on one machine: every method and seed of a configuration, resumable at any moment."""
