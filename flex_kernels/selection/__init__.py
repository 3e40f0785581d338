"""Pure mathematics of the choice: one expert, subsets of experts, neurons, and the refit of a down projection."""
