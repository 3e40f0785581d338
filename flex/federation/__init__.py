"""The federated algorithm on Flower's interfaces: a client's turn, messages, strategies, rounds, checkpoints."""
