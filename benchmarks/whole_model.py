"""A step of a whole model, eager and compiled: LoRA on attention, frozen experts in bf16, a graft on every layer.

    python -m benchmarks.whole_model

Forward and backward of the same model with transformers' grouped_mm and with flex, each as it stands and by
torch.compile. The graft beside grouped_mm is what a user would write (`layers.py`). The ways are measured in turns and
the least counts, as a share of flex eager. The compiler takes minutes.
"""

import argparse
from collections.abc import Callable

import peft
import torch
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import flex_kernels
from benchmarks import results
from benchmarks.layers import GraftedByHand
from benchmarks.tables import table
from benchmarks.turns import least_seconds

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1024,
    "moe_intermediate_size": 352,
    "shared_expert_intermediate_size": 512,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
BATCH, LENGTH, ROUNDS = 4, 128, 7
TOLERANCE = 3e-2  # of the loss, in bf16


def model_of(implementation: str, sizes: dict[str, int]) -> nn.Module:
    """The same weights for every implementation."""
    flex_kernels.register()
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes)).to(torch.bfloat16)
    model.set_experts_implementation(implementation)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    torch.manual_seed(1)
    for name, experts in flex_kernels.moe_layers(model).items():
        width = experts.down_proj.shape[2]
        graft = flex_kernels.Graft(experts.down_proj.shape[1], width, dtype=torch.bfloat16)
        graft.reset_parameters()
        nn.init.normal_(graft.down_proj, std=0.02)
        if implementation == "flex":
            experts.graft = graft
        else:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], GraftedByHand(experts, graft))
    return model


def steps(sizes: dict[str, int], batch: int, length: int, backend: str) -> dict[str, Callable[[], torch.Tensor]]:
    torch.manual_seed(2)
    ids = torch.randint(3, sizes["vocab_size"], (batch, length))

    def step(model: nn.Module, runner: Callable) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            model.zero_grad(set_to_none=True)
            loss = runner(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            return loss.detach()

        return run

    ways = {}
    for implementation in ("grouped_mm", "flex"):
        model = model_of(implementation, sizes)
        ways[f"{implementation} eager"] = step(model, model)
        ways[f"{implementation} compiled"] = step(model, torch.compile(model, backend=backend))
    return ways


def measure(
    sizes: dict[str, int] = SIZES,
    batch: int = BATCH,
    length: int = LENGTH,
    backend: str = "inductor",
    rounds: int = ROUNDS,
) -> list[list[str]]:
    """A row for each way: its name, milliseconds, share of flex eager."""
    ways = steps(sizes, batch, length, backend)
    losses = {name: float(run()) for name, run in ways.items()}
    for name, loss in losses.items():
        assert abs(loss / losses["flex eager"] - 1) < TOLERANCE, f"{name}: a loss of {loss}"
    best = least_seconds(ways, rounds)
    ours = best["flex eager"]
    return [[name, f"{1e3 * seconds:.1f}", f"{seconds / ours:.2f}"] for name, seconds in best.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    print(results.machine())
    print("\n".join(table(["whole model", "ms", "of flex eager"], measure())))
