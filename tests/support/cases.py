"""One table of layer shapes, each with its reason, and the inputs that go with a shape."""

from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One shape (`graft_width` 0: no graft), the reason why it is here, and how its tokens are routed."""

    name: str
    num_tokens: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    graft_width: int
    reason: str
    routing: str = "random"


CASES = (
    Case("plain", 37, 2, 32, 24, 6, 24, "nothing special: T below one tile"),
    Case("no-graft", 37, 2, 32, 24, 6, 0, "the layer as other people's code has it"),
    Case("odd", 19, 3, 33, 17, 5, 9, "odd H, I and I_g: masks on every tail"),
    Case("tiles", 70, 2, 64, 32, 3, 32, "more rows an expert than one tile of 16 or 32 holds"),
    Case("one-token", 1, 2, 16, 8, 4, 8, "T = 1, as in decoding"),
    Case("one-slot", 23, 1, 16, 8, 4, 8, "K = 1"),
    Case("all-experts", 11, 4, 16, 8, 4, 8, "K = E: every expert sees every token"),
    Case("one-expert", 9, 1, 16, 8, 1, 8, "E = 1"),
    Case("idle", 20, 2, 16, 8, 8, 8, "only experts 2 and 5 get tokens, the others are idle", "two"),
    Case("crowded", 33, 1, 16, 8, 6, 8, "all tokens to one expert", "last"),
    Case("sentinels", 25, 3, 16, 8, 4, 8, "expert parallelism: a third of the ids belong to another rank", "sentinels"),
    Case("elsewhere", 6, 2, 16, 8, 4, 8, "expert parallelism: no token is ours", "elsewhere"),
    Case("wide-graft", 21, 2, 16, 8, 4, 200, "a graft much wider than an expert"),
    Case("thin-graft", 21, 2, 16, 40, 4, 1, "a graft of one neuron"),
)
BY_NAME = {case.name: case for case in CASES}


def expert_indices(case: Case) -> Tensor:
    """[T, K] int64, distinct in each row where the experts are the layer's own."""
    shape = (case.num_tokens, case.top_k)
    if case.routing == "two":
        return torch.tensor([2, 5]).expand(shape).contiguous()
    if case.routing == "last":
        return torch.full(shape, case.num_experts - 1)
    ids = torch.rand(case.num_tokens, case.num_experts).argsort(dim=1)[:, : case.top_k].clone()
    if case.routing == "sentinels":
        ids[torch.rand(shape) < 1 / 3] = case.num_experts
    elif case.routing == "elsewhere":
        ids += case.num_experts
    return ids


def layer_inputs(case: Case, dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None) -> list:
    """The positional arguments of `grafted_experts`, in order; the graft's are None where the case has none."""
    T, K, H, E = case.num_tokens, case.top_k, case.hidden_size, case.num_experts
    width = case.intermediate_size
    weight_dtype = weight_dtype or dtype

    def normal(*shape: int, std: float = 1.0, of: torch.dtype = weight_dtype) -> Tensor:
        return (torch.randn(shape) * std).to(of)

    inputs = [
        normal(T, H, of=dtype),
        expert_indices(case),
        torch.rand(T, K) + 0.1,
        normal(E, 2 * width, H, std=H**-0.5),
        normal(E, H, width, std=width**-0.5),
    ]
    if case.graft_width:
        width = case.graft_width
        inputs += [normal(2 * width, H, std=H**-0.5, of=dtype), normal(H, width, std=width**-0.5, of=dtype)]
        inputs += [torch.randn(T)]
    else:
        inputs += [None, None, None]
    return [x if x is None else x.to(DEVICE) for x in inputs]
