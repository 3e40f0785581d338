"""The federated algorithm on Flower's interfaces: a client's turn, messages, strategies, rounds, checkpoints."""

__all__ = ["checkpoint", "client", "client_app", "flower", "local", "messages", "rounds", "scaffold", "strategy"]
