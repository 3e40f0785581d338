"""GraftedMoE in a small GPT of plain PyTorch, which knows nothing of transformers.

    python examples/plain_gpt.py

First the GPT learns to continue series with its MoE blocks as they are. Then every block gets a graft, all else is
frozen, and the grafts learn another rule.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flex_kernels import Graft, GraftedMoE

VOCABULARY, HIDDEN, LENGTH = 32, 32, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)])
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.moe = GraftedMoE(HIDDEN, 48, num_experts=6, top_k=2)  # where the dense MLP was

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.moe(self.norms[1](x))


class PlainGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(ids) + self.positions.weight[: ids.shape[1]]))


def series(step: int, seed: int) -> Tensor:
    """[16, LENGTH + 1]: each token is the one before plus `step`."""
    first = torch.randint(0, VOCABULARY, (16, 1), generator=torch.Generator().manual_seed(seed))
    return (first + step * torch.arange(LENGTH + 1)) % VOCABULARY


def train(gpt: PlainGPT, step: int, steps: int, learning_rate: float) -> list[float]:
    trained = [parameter for parameter in gpt.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    losses = []
    for seed in range(steps):
        ids = series(step, seed)
        loss = F.cross_entropy(gpt(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> dict[str, list[float]]:
    torch.manual_seed(0)
    gpt = PlainGPT()
    pretraining = train(gpt, step=1, steps=25, learning_rate=1e-2)
    gpt.requires_grad_(False)
    for block in gpt.blocks:
        block.moe.graft = Graft(HIDDEN, 48, logit_bias=0.0)
        block.moe.graft.reset_parameters()
    finetuning = train(gpt, step=2, steps=40, learning_rate=1e-2)
    for name, losses in (("all of it", pretraining), ("grafts alone, another rule", finetuning)):
        print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return {"pretraining": pretraining, "finetuning": finetuning}


if __name__ == "__main__":
    main()
