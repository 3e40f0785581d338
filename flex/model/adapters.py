"""What a method puts on the base and takes off again: LoRA on attention, and the private module of its row.

`PRIVATE` has one entry per kind of private module, all with the same interface (`Private`):

    graft    one gated expert per MoE layer (`flex_kernels.attach_graft`), started from what was chosen for the client
    lora     a second LoRA on the attention, beside the shared one, with about as many parameters as the grafts have
    copy     a second LoRA of the shared one's rank, which starts as the first shared values that its client meets
    expert   in each layer the expert that most of the client's tokens are routed to, trained in place: a token routed
             to it with weight w gets w E'(x) instead of w E(x), where E' starts as E
    expert_loras   a LoRA on every matrix of every expert, with about as many parameters as the grafts have together

`lora` and `expert` are controls: they separate what a graft contains from the capacity that it adds.
"""

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import ClassVar, Protocol

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import flex_kernels
from flex.config import LoraSettings
from flex.errors import FlexError
from flex.methods import SECOND_LORA, SHARED_LORA, GraftSettings, Method
from flex.model.attention import targets_of
from flex.model.base import Base, experts_sizes, router_of, weights_of
from flex.model.expert_loras import ExpertLoras
from flex_kernels import reference

LAYER_NUMBER = re.compile(r"\.(\d+)\.")


class Choice(Protocol):
    """What a private module needs of one layer's choice; `graft/choice.py` has all of it."""

    layer: int
    module: str
    criterion: str
    neurons: list[int]
    down_proj: Tensor | None

    @property
    def chosen(self) -> int | None: ...


class Private:
    """One kind of private module.

    attribute: the name under which it hangs on an experts module, if it does.
    own_rate: whether it trains with `train.graft_learning_rate`, not with that of the LoRA.
    """

    attribute = ""
    own_rate = True

    def put_on(self, base: Base, lora: LoraSettings, graft: GraftSettings) -> None:
        """Adds the module to the base, at zero or as initialised; its parameters declare their roles."""

    def take_off(self, base: Base) -> None:
        """The exact inverse of `put_on`; nothing where it is not on."""

    def start(self, base: Base, choices: Sequence[Choice], graft: GraftSettings, seed: int) -> None:
        """Writes the chosen starts into the modules."""

    def started(self, base: Base) -> bool:
        """Whether `start` has been called for what stands in the model."""
        return True

    def begin(self, base: Base) -> None:
        """What a module that nobody chooses a start for does when its client first takes part: for most nothing."""

    def modules(self, base: Base) -> list[nn.Module]:
        found = [getattr(layer, self.attribute, None) for layer in base.layers.values()] if self.attribute else []
        return [module for module in found if module is not None]

    def opening(self, base: Base, tokens: int | None = None) -> Tensor | None:
        """[layers]: each gate's mean opening in the last forward, over all its tokens or the first so many; None for a
        module without a gate."""
        return None


class GraftOn(Private):
    """A graft and its gate on every MoE layer."""

    attribute = "graft"

    def put_on(self, base: Base, lora: LoraSettings, graft: GraftSettings) -> None:
        low_rank = {"rank": graft.rank, "alpha": graft.alpha} if graft.training == "lora" else {}
        widths = [graft.graft_width(experts_sizes(layer)[1]) for layer in base.layers.values()]
        # fp32, whatever the base's dtype: a step of 4e-5 is lost in bf16.
        grafts = flex_kernels.attach_graft(
            base.model, widths, graft.combine, graft.logit_bias, dtype=torch.float32, **low_rank
        )
        for attached in grafts.values():
            attached.watch.told_training = True  # a run knows when its grafts start, and saves them itself

    def take_off(self, base: Base) -> None:
        flex_kernels.detach_graft(base.model)

    @torch.no_grad()
    def start(self, base: Base, choices: Sequence[Choice], graft: GraftSettings, seed: int) -> None:
        """A new module has normal weights with the standard deviation of the layer's pretrained experts: it differs
        from a graft in its content, not in the scale of its weights."""
        generator = torch.Generator().manual_seed(seed)
        for choice in choices:
            layer = base.layers[choice.module]
            own = layer.graft
            if len(choice.parts.ids):
                weights = weights_of(choice.module, layer)
                gate_up, down = flex_kernels.gather_neurons(*weights[:2], choice.parts.ids)
                own.gate_up_proj.copy_(gate_up)
                own.down_proj.copy_(down * choice.parts.scales if choice.down_proj is None else choice.down_proj)
            else:
                for parameter, pretrained in (
                    (own.gate_up_proj, layer.gate_up_proj),
                    (own.down_proj, layer.down_proj),
                ):
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(drawn * float(pretrained.float().std()))
                if choice.criterion == "zero":
                    own.down_proj.zero_()
            if isinstance(own, flex_kernels.LoraGraft):
                own.reset_parameters(torch.Generator(base.device).manual_seed(seed + choice.layer))
            own.logit_weight.zero_()
            if graft.gate == "router" and sum(choice.neurons):
                share = torch.tensor(choice.neurons, device=base.device) / sum(choice.neurons)
                own.logit_weight.copy_(share @ router_of(base, choice.module).float())
            own.logit_bias.fill_(graft.logit_bias)

    def started(self, base: Base) -> bool:
        """Until it is started all of a graft is zero, and stays so: it gets no gradient."""
        return all(bool(own.gate_up_proj.any()) for own in self.modules(base))

    def opening(self, base: Base, tokens: int | None = None) -> Tensor | None:
        return torch.stack([own.mean_opening(tokens) for own in self.modules(base)])


class SecondLora(Private):
    """A LoRA beside the shared one, both at work; its rank is the one that comes nearest to the grafts' count."""

    def put_on(self, base: Base, lora: LoraSettings, graft: GraftSettings) -> None:
        each = [module for module in base.adapter.modules() if isinstance(module, LoraLayer)]
        parameters_per_rank = sum(module.in_features + module.out_features for module in each)
        wanted = sum(graft_parameters(graft, layer) for layer in base.layers.values())
        rank = max(1, round(wanted / parameters_per_rank))
        base.adapter.add_adapter(SECOND_LORA, _lora_config(lora, rank, lora.alpha * rank / lora.rank))
        work_with(base, ())


class LoraCopy(Private):
    """A second LoRA like the shared one; until it trains for the first time it is a copy of the shared values of the
    moment, and its client's file holds zeros."""

    own_rate = False

    def put_on(self, base: Base, lora: LoraSettings, graft: GraftSettings) -> None:
        base.adapter.add_adapter(SECOND_LORA, _lora_config(lora, lora.rank, lora.alpha))

    def started(self, base: Base) -> bool:
        """A LoRA whose every B is zero has not trained."""
        return any(bool(p.any()) for name, p in base.model.named_parameters() if f"lora_B.{SECOND_LORA}." in name)

    @torch.no_grad()
    def begin(self, base: Base) -> None:
        for own, shared in copies(base).values():
            own.copy_(shared)


class AdaptedExpert(nn.Module):
    """One expert of a layer, trained in place: `hook`, on the experts module, swaps its part in the layer's output.

    Parameters: gate_up_proj [2I, H], down_proj [H, I], fp32; `expert` [1], which one, a parameter so that a client's
    file says it, frozen. Before `adapt` it is expert 0 with weights of zero.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"gate_up_proj": "personal", "down_proj": "personal"}

    def __init__(self, layer: nn.Module):
        super().__init__()
        weights = flex_kernels.expert_weights(layer)
        self.activation = weights.activation
        for name in ("gate_up_proj", "down_proj"):
            setattr(self, name, nn.Parameter(torch.zeros_like(getattr(weights, name)[0], dtype=torch.float32)))
        self.expert = nn.Parameter(torch.zeros(1, device=weights.down_proj.device), requires_grad=False)

    @torch.no_grad()
    def adapt(self, layer: nn.Module, expert: int) -> None:
        """Starts as this expert of the layer."""
        self.gate_up_proj.copy_(layer.gate_up_proj[expert])
        self.down_proj.copy_(layer.down_proj[expert])
        self.expert.fill_(expert)

    @staticmethod
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """`F_t + w_te (E'_e(x_t) - E_e(x_t))` for the tokens that are routed to e."""
        own = layer.adapted
        if own is None:
            return output
        hidden_states, expert_indices, routing_weights = inputs
        expert = int(own.expert)
        rows, slots = torch.where(expert_indices == expert)
        x = hidden_states[rows]
        dtype = x.dtype
        new = reference.expert(x, own.gate_up_proj.to(dtype), own.down_proj.to(dtype), own.activation)
        old = reference.expert(x, layer.gate_up_proj[expert], layer.down_proj[expert], own.activation)
        change = routing_weights[rows, slots, None] * (new - old).to(routing_weights.dtype)
        return output.index_add(0, rows, change.to(output.dtype))


class ExpertInPlace(Private):
    """An `AdaptedExpert` on every MoE layer."""

    attribute = "adapted"

    def put_on(self, base: Base, lora: LoraSettings, graft: GraftSettings) -> None:
        for layer in base.layers.values():
            layer.adapted = AdaptedExpert(layer)
            layer._adapted_hook = layer.register_forward_hook(AdaptedExpert.hook)

    def take_off(self, base: Base) -> None:
        for layer in base.layers.values():
            if hasattr(layer, "_adapted_hook"):
                layer._adapted_hook.remove()
                del layer._adapted_hook, layer.adapted

    def start(self, base: Base, choices: Sequence[Choice], graft: GraftSettings, seed: int) -> None:
        for choice in choices:
            base.layers[choice.module].adapted.adapt(base.layers[choice.module], choice.chosen)


class LorasOnExperts(Private):
    """An `ExpertLoras` on every MoE layer, which computes the layer in its experts' place."""

    attribute = "expert_loras"

    def put_on(self, base: Base, lora: LoraSettings, graft: GraftSettings) -> None:
        for name, layer in base.layers.items():
            weights = weights_of(name, layer)
            num_experts, hidden_size, intermediate_size = weights.down_proj.shape
            per_rank = num_experts * (2 * hidden_size + 3 * intermediate_size)
            rank = max(1, round(graft_parameters(graft, layer) / per_rank))
            layer.expert_loras = ExpertLoras(weights, rank, lora.alpha / lora.rank)
            layer.expert_loras.stand_in_for(layer)

    def take_off(self, base: Base) -> None:
        for layer in base.layers.values():
            if hasattr(layer, "expert_loras"):
                ExpertLoras.step_aside(layer)
                del layer.expert_loras


PRIVATE: dict[str | None, Private] = {
    None: Private(),
    "graft": GraftOn(),
    "lora": SecondLora(),
    "copy": LoraCopy(),
    "expert": ExpertInPlace(),
    "expert_loras": LorasOnExperts(),
}


def copies(base: Base) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(a parameter of the second LoRA, the one of the shared LoRA that it is a copy of) by the name of the first;
    nothing unless the two are of one shape."""
    parameters = dict(base.model.named_parameters())
    pairs = {
        name: (p, parameters[name.replace(f".{SECOND_LORA}.", f".{SHARED_LORA}.")])
        for name, p in parameters.items()
        if f".{SECOND_LORA}." in name
    }
    return pairs if all(own.shape == shared.shape for own, shared in pairs.values()) else {}


def work_with(base: Base, loras: tuple[str, ...]) -> None:
    """Which LoRAs are at work; none named: all there are."""
    if base.adapter is not None:
        base.adapter.base_model.set_adapter(list(loras or base.adapter.peft_config))


def weigh(base: Base, second: Tensor | float) -> None:
    """The second LoRA counts `second` times and the shared one the rest: a number, or one for each row of the batches
    that follow ([B] or [B, 1, 1])."""
    share = second if isinstance(second, float) else second.reshape(-1, 1, 1)
    for layer in base.model.modules():
        if isinstance(layer, LoraLayer):
            for name, part in ((SHARED_LORA, 1 - share), (SECOND_LORA, share)):
                layer.scaling[name] = layer.lora_alpha[name] / layer.r[name] * part


def graft_parameters(graft: GraftSettings, layer: nn.Module) -> int:
    """How many numbers of a graft with these settings train."""
    hidden_size, intermediate_size = experts_sizes(layer)
    width = graft.graft_width(intermediate_size)
    low_rank = graft.rank * (2 * hidden_size + 3 * width)
    return (low_rank if graft.training == "lora" else 3 * width * hidden_size) + hidden_size + 1


def wrap(base: Base, method: Method, lora: LoraSettings, graft: GraftSettings, seed: int) -> None:
    """Puts the method's LoRA and private module on the base, in place; LoRA starts as `seed` alone says."""
    unwrap(base)
    private = PRIVATE[method.private]
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a name that is deprecated there
        warnings.simplefilter("ignore", FutureWarning)
        if method.lora:
            lora = dataclasses.replace(lora, targets=targets_of(base.model, lora))
            torch.manual_seed(seed)
            base.adapter = peft.get_peft_model(base.model, _lora_config(lora, lora.rank, lora.alpha))
        private.put_on(base, lora, graft.of(method))
    if method.module_role == "shared":
        for module in private.modules(base):
            roles = module.parameter_roles.items()
            module.parameter_roles = {name: "shared" if role == "personal" else role for name, role in roles}
    _declare_loras(base, method)
    work_with(base, method.loras)
    if method.weighed:
        weigh(base, 0.5)


def _declare_loras(base: Base, method: Method) -> None:
    """Who owns which matrix of the LoRAs."""
    layers = {name: module for name, module in base.model.named_modules() if isinstance(module, LoraLayer)}
    numbers = sorted({number for name in layers if (number := _layer_number(name)) is not None})
    upper = set(numbers[len(numbers) // 2 :])
    for name, layer in layers.items():
        stays = method.keeps == "upper" and _layer_number(name) in upper
        for which, matrices in (("A", layer.lora_A), ("B", layer.lora_B)):
            for lora, matrix in matrices.items():
                own = lora == SECOND_LORA or stays or method.keeps == which
                matrix.parameter_roles = {"weight": "personal" if own else method.lora}


def _layer_number(name: str) -> int | None:
    """The number of the decoder layer that a module stands in."""
    found = LAYER_NUMBER.search(f"{name}.")
    return int(found[1]) if found else None


def _lora_config(lora: LoraSettings, rank: int, alpha: float) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets))


def unwrap(base: Base) -> None:
    """Takes LoRA and private modules off again; the base is as it was loaded."""
    for private in PRIVATE.values():
        private.take_off(base)
    if base.adapter is not None:
        base.adapter.unload()
        base.adapter = None
    base.model.requires_grad_(False)


@contextlib.contextmanager
def pretrained_only(base: Base, keep_lora: bool = False, keep: Collection[nn.Module] = ()) -> Iterator[nn.Module]:
    """The model as it was pretrained: whatever `wrap` put on it is out of the way inside the block, and nothing trains.

    `keep_lora`: the LoRA stays at work, with the values it has; so do the modules in `keep`.
    """
    added = [
        (layer, private.attribute, module)
        for layer in base.layers.values()
        for private in PRIVATE.values()
        if private.attribute and (module := getattr(layer, private.attribute, None)) is not None and module not in keep
    ]
    training, trained = base.model.training, [p for p in base.model.parameters() if p.requires_grad]
    off = base.adapter is not None and not keep_lora
    try:
        for layer, name, _ in added:
            setattr(layer, name, None)
        base.model.eval().requires_grad_(False)
        with base.adapter.disable_adapter() if off else contextlib.nullcontext():
            yield base.model
    finally:
        for layer, name, module in added:
            setattr(layer, name, module)
        base.model.train(training).requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def recomputed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside the block, if `wanted`, a backward computes each layer's activations again instead of keeping them.

    Raises:
        FlexError: the model does not support it.
    """
    if not wanted:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise FlexError(f"{type(model).__name__} cannot recompute its layers; expected gradient_checkpointing = false")
    named = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # since transformers 5.23
    getattr(model, f"{named}_checkpointing_enable")(**{f"{named}_checkpointing_kwargs": {"use_reentrant": False}})
    # transformers' own on the embeddings: of use to reentrant checkpoints alone, and the compiler stumbles over it.
    if hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()
    try:
        yield
    finally:
        getattr(model, f"{named}_checkpointing_disable")()
