"""Who computes: plain PyTorch, csrc on the CPU, Triton on a GPU; the same names and signatures in all of them."""
