"""What a format costs in quality: loss and KL to the dense base on held-out responses, per format.

    python -m benchmarks.frozen_weights                                  # the demo's base and its held-out data
    python -m benchmarks.frozen_weights --model FOLDER --data TEST.jsonl --template alpaca

Loss and KL are means over response tokens, by teacher forcing; KL(dense || format). "differs" is the share of tokens
whose most likely successor is another one. For the dense base KL is 0 by definition.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flex.config import RunConfig
from flex.data.examples import Encoder, Example
from flex.demo.data import demo_config, write_demo_data
from flex.evaluation.score import response_logits
from flex.model.base import load_base
from flex.runs.world import load_world
from flex_kernels.weights import QUANTIZED

BATCH = 16


@torch.no_grad()
def logits_of(model: torch.nn.Module, encoder: Encoder, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Of every response token: log-probabilities [N, V] and the token [N]."""
    found = []
    for start in range(0, len(examples), BATCH):
        logits, targets, _ = response_logits(model, encoder.batch(examples[start : start + BATCH], torch.device("cpu")))
        found.append((F.log_softmax(logits.float(), dim=-1), targets))
    return torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])


def measure(config: RunConfig, seed: int, limit: int) -> dict[str, dict[str, dict[str, float]]]:
    """By format, by set ("clients", "general"): tokens, loss, kl, differs."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    dense: dict[str, Tensor] = {}
    for format in ("auto", *QUANTIZED):
        model = load_base(config.with_values(model={"experts": format}).model)
        world = load_world(config, seed, model)
        sets = {"clients": [e for client in world.clients for e in client.test], "general": world.general}
        if not config.data.test:  # one file, of which a share was held out: all of it
            sets["clients"] += [e for client in world.clients for e in client.train]
        for name, examples in sets.items():
            if not examples:
                continue
            log_p, targets = logits_of(model.model, world.encoder, examples[:limit])
            of_dense = dense.setdefault(name, log_p)
            results.setdefault("dense" if format == "auto" else format, {})[name] = {
                "tokens": len(targets),
                "loss": float(F.nll_loss(log_p, targets)),
                "kl": float((of_dense.exp() * (of_dense - log_p)).sum(-1).mean()),
                "differs": float((of_dense.argmax(-1) != log_p.argmax(-1)).float().mean()),
            }
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a dense base; without it the demo's")
    parser.add_argument("--data", help="JSON lines with instruction, context, response: held out from the base")
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3], help="of the demo's data")
    parser.add_argument("--limit", type=int, default=1000, help="sequences of a set at most")
    given = parser.parse_args(arguments)
    print("| base | seed | set | tokens | format | loss | KL to dense | differs % |\n| --- " * 1 + "|" + " --- |" * 7)
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as folder:
            if given.model:
                config = RunConfig().with_values(
                    model={"path": given.model},
                    data={"train": given.data, "template": given.template, "split": "iid", "num_clients": 1},
                )
            else:
                config = demo_config(folder)
                write_demo_data(Path(config.data.for_seed(seed).train).parent, seed)
            for format, sets in measure(config, seed, given.limit).items():
                for name, row in sets.items():
                    numbers = f"{row['loss']:.4f} | {row['kl']:.5f} | {100 * row['differs']:.2f}"
                    print(f"| {given.model or 'demo'} | {seed} | {name} | {row['tokens']} | {format} | {numbers} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
