"""torch.export of a grafted model's forward, saved and loaded again, for any batch size and length.

    python examples/export.py

The program contains the operation `flex::grafted_experts`: whoever loads it imports flex_kernels first.
"""

import io

import tiny_moe
import torch

import flex_kernels


def main() -> dict[str, float]:
    model = tiny_moe.model().eval()
    for graft in flex_kernels.attach_graft(model, width=8, logit_bias=0.0).values():
        torch.nn.init.normal_(graft.gate_up_proj, std=0.2)
        torch.nn.init.normal_(graft.down_proj, std=0.2)
    any_size = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, "use_cache": None}
    with torch.no_grad():
        inputs = {"input_ids": tiny_moe.sequences(2), "use_cache": False}
        program = torch.export.export(model, (), inputs, dynamic_shapes=any_size)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        ids = tiny_moe.sequences(3, length=11)
        difference = loaded(input_ids=ids, use_cache=False).logits - model(input_ids=ids, use_cache=False).logits
    calls = sum("flex.grafted_experts" in str(node.target) for node in program.graph.nodes)
    print(f"{calls} layers in the program, its logits differ by {float(difference.abs().max()):.1e}")
    return {"calls": calls, "difference": float(difference.abs().max())}


if __name__ == "__main__":
    main()
