"""What the examples share: a random MoE model small enough for any machine, and data with something to learn.

In your own code both are yours; nothing here is needed.
"""

import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

VOCABULARY = 64


def model(seed: int = 0, **changes: int) -> OlmoeForCausalLM:
    """OLMoE with two layers of six experts, two of them for each token."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    }
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(seed)
    return OlmoeForCausalLM(OlmoeConfig(**tokens, **sizes | changes, initializer_range=0.15))


def sequences(count: int, length: int = 16, seed: int = 0) -> Tensor:
    """[count, length] token ids: arithmetic series, so that the next token can be learnt."""
    generator = torch.Generator().manual_seed(seed)
    first, step = torch.randint(0, 20, (2, count, 1), generator=generator)
    return (first + (step % 3 + 1) * torch.arange(length)) % (VOCABULARY - 3) + 3
