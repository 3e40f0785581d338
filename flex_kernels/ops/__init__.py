"""The operations for torch: `custom_op`, fake, backward, autograd, and the public functions with their checks."""
