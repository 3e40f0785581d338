"""torch.compile of a whole model, without a graph break: forward and backward, also with another sequence length.

python examples/compile.py
"""

import tiny_moe
import torch

import flex_kernels


def main(backend: str = "inductor") -> dict[str, float]:
    model = tiny_moe.model(num_hidden_layers=1)
    model.requires_grad_(False)
    torch.manual_seed(1)
    for graft in flex_kernels.attach_graft(model, width=8).values():
        torch.nn.init.normal_(graft.gate_up_proj, std=0.2)
        torch.nn.init.normal_(graft.down_proj, std=0.2)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    results = {}
    for length in (16, 12):
        ids = tiny_moe.sequences(4, length)
        gradients = []
        for runner in (compiled, model):
            runner(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
        ours, plain = gradients
        results[f"length {length}"] = max(float((ours[name] - plain[name]).abs().max()) for name in plain)
        print(f"length {length}: the gradients of {len(plain)} tensors differ by {results[f'length {length}']:.1e}")
    return results


if __name__ == "__main__":
    main()
