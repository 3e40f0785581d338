"""generate() with a KV cache, one sequence at a time, and how long a token takes beside transformers' own experts.

python examples/generate.py
"""

import time

import tiny_moe
import torch
from transformers import PreTrainedModel

import flex_kernels

PROMPT, NEW = 8, 16


def milliseconds_per_token(model: PreTrainedModel, tokens: int) -> float:
    """The quickest of so many decoding steps."""
    with torch.no_grad():
        out = model(tiny_moe.sequences(1, PROMPT), use_cache=True)
        times = []
        for _ in range(tokens):
            token = out.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            times.append(time.perf_counter() - started)
    return 1000 * min(times)


def main(rounds: int = 5) -> dict[str, object]:
    flex_kernels.register()
    model = tiny_moe.model(hidden_size=256, intermediate_size=128, num_experts=16).eval()
    texts, times = {}, {}
    for name in ["flex", "grouped_mm"] * rounds:  # turn by turn: a busy machine is unfair to both alike
        model.set_experts_implementation(name)
        texts[name] = model.generate(tiny_moe.sequences(1, PROMPT), max_new_tokens=NEW, do_sample=False).tolist()
        times[name] = min(times.get(name, float("inf")), milliseconds_per_token(model, NEW))
    same = texts["flex"] == texts["grouped_mm"]
    print(f"flex {times['flex']:.2f} ms, grouped_mm {times['grouped_mm']:.2f} ms a token; same text: {same}")
    return {"same": same, "ratio": times["grouped_mm"] / times["flex"]}


if __name__ == "__main__":
    main()
