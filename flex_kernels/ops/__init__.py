"""The operations for torch: `custom_op`, fake, backward, autograd, and the public functions with their checks.

The public functions are in `flex_kernels` itself; a program that was exported needs this folder imported.
"""
