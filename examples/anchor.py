"""A graft trained in your own loop, beside an anchor that holds the model to what its base knows on general text.

    python examples/anchor.py

The base has learnt arithmetic series; its user's own series begin alike and run downwards. Without the anchor the graft
unlearns the upward ones.
"""

import tiny_moe
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import flex_kernels


def pretrained(series: Tensor) -> PreTrainedModel:
    model = tiny_moe.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(input_ids=series, labels=series).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False).eval()


def train(model: PreTrainedModel, own: Tensor, general: Tensor, weight: float, steps: int = 60) -> None:
    with torch.no_grad():  # the base's answers: once, before there are grafts
        base = model(input_ids=general).logits.log_softmax(
            -1
        )  # a large vocabulary: keep the likeliest 64 of each token
    torch.manual_seed(1)
    for graft in flex_kernels.attach_graft(model, width=16, logit_bias=0.0).values():
        graft.reset_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        pick = torch.randint(len(general), (4,))  # a few anchors beside each batch of one's own
        now = model(input_ids=general[pick]).logits.log_softmax(-1)
        forgotten = F.kl_div(now.flatten(0, 1), base[pick].flatten(0, 1), log_target=True, reduction="batchmean")
        (model(input_ids=own, labels=own).loss + weight * forgotten).backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> dict[str, tuple[float, float]]:
    general, held_out = tiny_moe.sequences(64), tiny_moe.sequences(32, seed=1)
    own = tiny_moe.sequences(32, seed=2).flip(1)
    losses = {}
    for name, weight in (("base", None), ("no anchor", 0.0), ("anchor", 1.0)):
        model = pretrained(general)
        if weight is not None:
            train(model, own, general, weight)
        with torch.no_grad():
            losses[name] = tuple(float(model(input_ids=ids, labels=ids).loss) for ids in (own, held_out))
        print(f"{name:10} loss on one's own text {losses[name][0]:.3f}, on general text {losses[name][1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
