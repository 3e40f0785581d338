"""The layer as plain modules: `Graft`, the personal expert with its gate, `LoraGraft`, which trains less of it, and
`GraftedMoE`, a whole MoE layer.

Each module declares the roles of its own parameters: `parameter_roles` maps a name to "shared", "personal" or "frozen";
a parameter that no module declares is frozen.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flex_kernels import reference
from flex_kernels.ops.checks import autocast_off, check_activation, check_combine, wide_dtype
from flex_kernels.ops.experts import grafted_experts
from flex_kernels.ops.graft_logits import graft_logits
from flex_kernels.ops.grafted_route import grafted_route

Device = torch.device | str | None


class Graft(nn.Module):
    """One trained expert that is always on, behind a sigmoid gate: adds `sigmoid(g.x + b) D (act(G x) * (U x))`.

    Starts at zero: it adds nothing and receives no gradient until you copy weights in (`copy_`, of pretrained
    components) or call `reset_parameters`.

    Args:
        hidden_size: H.
        width: I_g, any.
        combine: "additive" (`F + s E_g`) or "convex" (`(1 - s) F + s E_g`).
        activation: "silu", "gelu" or "gelu_tanh".
        logit_bias: start of `b`; -4 opens the gate by 2 %.

    Parameters: gate_up_proj [2I_g, H], down_proj [H, I_g], logit_weight [H] and logit_bias [1] (`g` and `b`).
    """

    parameter_roles: ClassVar[dict[str, str]] = {
        "gate_up_proj": "personal",
        "down_proj": "personal",
        "logit_weight": "personal",
        "logit_bias": "personal",
    }

    def __init__(
        self,
        hidden_size: int,
        width: int,
        *,
        combine: str = "additive",
        activation: str = "silu",
        logit_bias: float = -4.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_combine(combine)
        check_activation(activation)
        if hidden_size < 1 or width < 1:
            raise ValueError(f"hidden_size is {hidden_size} and width is {width}, expected both at least 1")
        factory = {"device": device, "dtype": dtype}
        self.hidden_size, self.width, self.combine, self.activation = hidden_size, width, combine, activation
        self.gate_up_proj = nn.Parameter(torch.zeros(2 * width, hidden_size, **factory))
        self.down_proj = nn.Parameter(torch.zeros(hidden_size, width, **factory))
        self.logit_weight = nn.Parameter(torch.zeros(hidden_size, **factory))
        self.logit_bias = nn.Parameter(torch.full((1,), logit_bias, **factory))  # FSDP takes no scalars
        self._last_logits: Tensor | None = None
        self._expected: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A fresh start that still adds nothing but trains: normal `G`, `U` (std `1/sqrt(H)`), zero `D`."""
        self.gate_up_proj.normal_(std=self.hidden_size**-0.5, generator=generator)
        self.down_proj.zero_()

    def weights(self) -> tuple[Tensor, Tensor]:
        """The matrices that the layer computes with: [2I_g, H] and [H, I_g]."""
        return self.gate_up_proj, self.down_proj

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The gate before the sigmoid, `g.x + b`: [T, H] -> [T], in fp32 also under autocast."""
        expected, self._expected = self._expected, None
        if expected is not None and expected[0] is hidden_states:
            return self.remember(expected[1])
        return self.remember(graft_logits(hidden_states, self.logit_weight, self.logit_bias))

    def expect(self, hidden_states: Tensor, logits: Tensor) -> None:
        """The next `logits` of this very tensor are these, [T], which its router has computed (`fused_router.py`)."""
        self._expected = (hidden_states, logits)

    def remember(self, logits: Tensor) -> Tensor:
        """The same logits, of which `last_opening` tells: for who computes them elsewhere (`grafted_route`)."""
        if not torch.compiler.is_exporting():  # an exported program has no place for it
            self._last_logits = logits.detach()
        return logits

    @property
    def last_opening(self) -> Tensor | None:
        """How far the gate stood open in the last forward: the mean of its sigmoid, a scalar; None before any."""
        return self.mean_opening()

    def mean_opening(self, tokens: int | None = None) -> Tensor | None:
        """As `last_opening`, over the first so many tokens of that forward; None for all of them."""
        return None if self._last_logits is None else torch.sigmoid(self._last_logits[:tokens]).mean()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The expert alone, without its gate: [T, H] -> [T, H]."""
        dtype = hidden_states.dtype
        gate_up_proj, down_proj = self.weights()
        return reference.expert(hidden_states, gate_up_proj.to(dtype), down_proj.to(dtype), self.activation)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.width}, combine={self.combine!r}, activation={self.activation!r}"


class LoraGraft(Graft):
    """A graft with few trained numbers: a frozen copy of pretrained weights and a low-rank part, `W + (alpha / r) B A`.

    It computes what a `Graft` of these weights computes; autograd carries their gradient on to `A` and `B`. The copy
    starts at zero and is to be filled (`copy_`): the factors of a zero copy get no gradient. `merge` adds the low-rank
    part to the copy, for inference; `state_dict` always holds the copy without it.

    Args:
        rank: r of both matrices.
        alpha: scale of the low-rank part, `2 r` if not given.
        copy_dtype: of the frozen copy; `dtype` is that of all trained parameters.
        The rest: as in `Graft`.

    Parameters: those of `Graft`, of which gate_up_proj and down_proj are the frozen copy, and the factors
    gate_up_lora_a [r, H], gate_up_lora_b [2I_g, r], down_lora_a [r, I_g], down_lora_b [H, r].
    """

    parameter_roles: ClassVar[dict[str, str]] = {
        "gate_up_proj": "frozen",
        "down_proj": "frozen",
        "gate_up_lora_a": "personal",
        "gate_up_lora_b": "personal",
        "down_lora_a": "personal",
        "down_lora_b": "personal",
        "logit_weight": "personal",
        "logit_bias": "personal",
    }

    def __init__(
        self,
        hidden_size: int,
        width: int,
        rank: int,
        alpha: float | None = None,
        *,
        copy_dtype: torch.dtype | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, width, device=device, dtype=dtype, **options)
        if rank < 1:
            raise ValueError(f"rank is {rank}, expected at least 1")
        factory, copy_dtype = {"device": device, "dtype": dtype}, copy_dtype or self.gate_up_proj.dtype
        self.rank, self.alpha, self.merged = rank, float(2 * rank if alpha is None else alpha), False
        self.gate_up_proj = nn.Parameter(self.gate_up_proj.data.to(copy_dtype), requires_grad=False)
        self.down_proj = nn.Parameter(self.down_proj.data.to(copy_dtype), requires_grad=False)
        self.gate_up_lora_a = nn.Parameter(torch.empty(rank, hidden_size, **factory))
        self.gate_up_lora_b = nn.Parameter(torch.empty(2 * width, rank, **factory))
        self.down_lora_a = nn.Parameter(torch.empty(rank, width, **factory))
        self.down_lora_b = nn.Parameter(torch.empty(hidden_size, rank, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The low-rank part at its start, where it is zero: normal `A` (std `1/sqrt(columns)`), zero `B`."""
        for a, b in ((self.gate_up_lora_a, self.gate_up_lora_b), (self.down_lora_a, self.down_lora_b)):
            a.normal_(std=a.shape[1] ** -0.5, generator=generator)
            b.zero_()

    def weights(self) -> tuple[Tensor, Tensor]:
        """`W + (alpha / r) B A` of both matrices, in fp32 also under autocast: [2I_g, H] and [H, I_g].

        Raises:
            RuntimeError: the low-rank part is merged and would get no gradient, although gradients are on.
        """
        if self.merged:
            if torch.is_grad_enabled() and self.gate_up_lora_b.requires_grad:
                raise RuntimeError("the graft's LoRA is merged and would not train; unmerge() it or use torch.no_grad")
            return self.gate_up_proj, self.down_proj
        gate_up, down = self._low_rank()
        return self.gate_up_proj.to(gate_up.dtype) + gate_up, self.down_proj.to(down.dtype) + down

    def merge(self) -> None:
        """Adds the low-rank part to the copy, rounded to its dtype: a forward costs no more than without LoRA."""
        self._set_merged(True)

    def unmerge(self) -> None:
        """Takes the low-rank part out of the copy again, which restores it up to rounding."""
        self._set_merged(False)

    @torch.no_grad()
    def _set_merged(self, merged: bool) -> None:
        if merged == self.merged:
            raise ValueError(f"the graft's LoRA is {'already' if merged else 'not'} merged")
        for weight, low_rank in zip((self.gate_up_proj, self.down_proj), self._low_rank(), strict=True):
            weight.copy_(weight.to(low_rank.dtype) + (low_rank if merged else -low_rank))
        self.merged = merged

    def _low_rank(self) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(self.gate_up_lora_a.dtype)
        with autocast_off(self.gate_up_lora_a):
            gate_up = self.gate_up_lora_b.to(wide) @ self.gate_up_lora_a.to(wide)
            down = self.down_lora_b.to(wide) @ self.down_lora_a.to(wide)
        return gate_up * (self.alpha / self.rank), down * (self.alpha / self.rank)

    @torch.no_grad()
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            for name, low_rank in zip(("gate_up_proj", "down_proj"), self._low_rank(), strict=True):
                weight = destination[prefix + name]
                destination[prefix + name] = (weight.to(low_rank.dtype) - low_rank).to(weight.dtype)

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.merged:
            self.unmerge()
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"


class GraftedMoE(nn.Module):
    """A Mixture-of-Experts layer for code without transformers: router, experts, and (if wanted) one graft.

    `y = sum_k w_k E_k(x) + sigmoid(g.x + b) E_g(x)` with `w` the `top_k` largest of the router's softmax.

    Args:
        hidden_size, intermediate_size, num_experts, top_k: H, I, E, K.
        graft_width: I_g, or None for a layer without a graft. A graft starts fresh (`Graft.reset_parameters`).
        renormalize: divide the kept routing weights by their sum. None does so for two experts per token and more: of
            one expert the weight would be w / w = 1 whatever the router says, and the router could not learn.
        combine, activation, logit_bias: as in `Graft`.
        recompute: as in `grafted_experts`.

    Parameters: router.weight [E, H], gate_up_proj [E, 2I, H], down_proj [E, H, I], graft.*; all trainable until
    `freeze_pretrained`.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"gate_up_proj": "frozen", "down_proj": "frozen"}

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        graft_width: int | None = None,
        renormalize: bool | None = None,
        combine: str = "additive",
        activation: str = "silu",
        logit_bias: float = -4.0,
        recompute: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_combine(combine)
        check_activation(activation)
        if hidden_size < 1 or intermediate_size < 1:
            raise ValueError(
                f"hidden_size is {hidden_size} and intermediate_size is {intermediate_size}, expected both at least 1"
            )
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}, expected 1 to {num_experts}, the number of experts")
        factory = {"device": device, "dtype": dtype}
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        renormalize = top_k > 1 if renormalize is None else renormalize
        self.renormalize, self.combine, self.activation, self.recompute = renormalize, combine, activation, recompute
        self.router = nn.Linear(hidden_size, num_experts, bias=False, **factory)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size, **factory))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, **factory))
        nn.init.normal_(self.gate_up_proj, std=hidden_size**-0.5)
        nn.init.normal_(self.down_proj, std=intermediate_size**-0.5)
        self.graft: Graft | None = None
        if graft_width is not None:
            self.graft = Graft(
                hidden_size, graft_width, combine=combine, activation=activation, logit_bias=logit_bias, **factory
            )
            self.graft.reset_parameters()

    def freeze_pretrained(self) -> "GraftedMoE":
        """Freezes router and experts; only the graft trains."""
        for parameter in (*self.router.parameters(), self.gate_up_proj, self.down_proj):
            parameter.requires_grad_(False)
        return self

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        if hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden_states has shape {list(hidden_states.shape)}, expected [..., {self.hidden_size}]")
        flat = hidden_states.reshape(-1, self.hidden_size)  # [T, H]
        gate = (None, None) if self.graft is None else (self.graft.logit_weight, self.graft.logit_bias)
        routing_weights, expert_indices, logits, _ = grafted_route(
            flat, self.router.weight, *gate, self.top_k, self.renormalize
        )
        graft = ()
        if self.graft is not None:
            graft = (*self.graft.weights(), self.graft.remember(logits))
        out = grafted_experts(
            flat,
            expert_indices,
            routing_weights,
            self.gate_up_proj,
            self.down_proj,
            *graft,
            combine=self.combine,
            activation=self.activation,
            recompute=self.recompute,
        )
        return out.view(hidden_states.shape)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, top_k={self.top_k}, renormalize={self.renormalize}"
