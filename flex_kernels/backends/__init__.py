"""Who computes: plain PyTorch (`pytorch`), csrc (`native`), Triton (`triton.stages`); `plan.py` chooses among them.

All three have the same names and signatures, and take one call of the layer as a `LayerCall`. Nothing here imports
Triton until it is asked for.
"""

from flex_kernels.backends.call import LayerCall, Needs

__all__ = ["LayerCall", "Needs"]
