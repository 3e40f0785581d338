"""Pure mathematics of the choice: one expert, subsets of experts, neurons, and the refit of a down projection.

`flex_kernels` exports the public functions; `best_scales` of `one_expert.py` is for those who fold a scale in.
"""
