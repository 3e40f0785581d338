"""What a calibration pass keeps of one layer: sums over tokens, of a size that does not depend on how many there were.

`LayerScores` is of the first pass, over all pretrained experts; `LayerFit` of a second one, over the few neurons that
the first left in question. Every criterion of `graft.py` follows from them.
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

import flex_kernels
from flex.errors import FlexError
from flex.graft.calibrate import Tokens
from flex.methods import GraftSettings
from flex.model.base import Base, router_of, weights_of
from flex_kernels import ExpertGram, NeuronSums, RenormalizedLosses, expert_gram, merged, neuron_sums

PLAIN = ("distance", "length", "scores", "energy", "output_energy", "routed_mass")
NEURONS = ("neuron_energy", "neuron_correlation")
SOFTMAX_TOLERANCE = 5e-2  # of routing weights in bf16


class LayerScores:
    """The first pass of one layer: how each expert alone does, and what the criterion asks for besides.

    `distance` [E] and `length` []: the sums over batches of ||T_b - E_i(X_b)|| and ||T_b||; `scores` [E, 3]: the sum of
    `score_experts`; `energy` and `output_energy` []: ||T||^2 and ||F||^2; `routed_mass` [E]. With the criterion that
    asks for it: `gram` (scaled_subset), `subsets` (renormalized), `neuron_energy` and `neuron_correlation` [E, I]
    (neurons). All in fp64.
    """

    def __init__(self, base: Base, name: str, settings: GraftSettings):
        self.name, self.criterion = name, settings.criterion
        self.gate_up_proj, self.down_proj, self.activation = weights_of(name, base.layers[name])
        num_experts, _, intermediate_size = self.down_proj.shape
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=base.device)
        self.distance, self.scores, self.routed_mass = zeros(num_experts), zeros(num_experts, 3), zeros(num_experts)
        self.length, self.energy, self.output_energy = zeros(()), zeros(()), zeros(())
        self.gram: ExpertGram | None = None
        self.subsets: RenormalizedLosses | None = None
        if self.criterion == "renormalized":
            self.router = router_of(base, name)
            self.subsets = RenormalizedLosses(num_experts, settings.experts)
        if self.criterion == "neurons":
            self.neuron_energy = zeros(num_experts, intermediate_size)
            self.neuron_correlation = zeros(num_experts, intermediate_size)

    def add(self, tokens: Tokens, held_out: bool) -> None:
        """Held-out tokens do not take part in the choice."""
        if held_out or not len(tokens.target):
            return
        x, target = tokens.hidden_states, tokens.target
        experts = (x, target, self.gate_up_proj, self.down_proj)
        offsets = torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)
        scores = flex_kernels.score_experts(*experts, offsets, activation=self.activation)
        energy = (target.float() ** 2).sum().double()
        self.distance += flex_kernels.reconstruction(scores)
        self.length += energy.sqrt()
        self.scores += scores[0].double()
        self.energy += energy
        self.output_energy += (tokens.output.float() ** 2).sum().double()
        self.routed_mass -= flex_kernels.routed_mass(tokens.expert_indices, tokens.routing_weights, len(self.scores))
        if self.criterion == "scaled_subset":
            gram = expert_gram(*experts, activation=self.activation)
            self.gram = gram if self.gram is None else merged(self.gram, gram)
        if self.subsets is not None:
            logits = router_logits(self.name, self.router, tokens)
            self.subsets.add(*experts, logits, activation=self.activation)
        if self.criterion == "neurons":
            neuron_energy, correlation = flex_kernels.score_neurons(*experts, activation=self.activation)
            self.neuron_energy += neuron_energy
            self.neuron_correlation += correlation

    def tensors(self) -> dict[str, Tensor]:
        names = (*PLAIN, *NEURONS) if self.criterion == "neurons" else PLAIN
        kept = {name: getattr(self, name) for name in names}
        if self.gram is not None:
            kept |= {f"gram.{field}": value for field, value in self.gram._asdict().items()}
        if self.subsets is not None:
            state = {name: value for name, value in vars(self.subsets).items() if name != "subsets"}
            kept |= {f"subsets.{name}": torch.as_tensor(value, dtype=torch.float64) for name, value in state.items()}
        return kept

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        gram = {}
        for name, value in tensors.items():
            kind, _, field = name.partition(".")
            if kind == "gram":
                gram[field] = value
            elif kind == "subsets":
                old = getattr(self.subsets, field, None)
                if old is None:  # of an earlier version
                    continue
                setattr(self.subsets, field, value if isinstance(old, Tensor) else type(old)(value.item()))
            else:
                setattr(self, name, value)
        if gram:
            self.gram = ExpertGram(**gram)

    def check(self) -> None:
        """Raises FlexError where nothing was routed here, or there is no target."""
        if not self.routed_mass.sum() > 0:
            raise FlexError(
                f"{self.name} was routed none of the calibration tokens, so there is nothing to choose a graft by; "
                "expected some routing weight on its experts"
            )
        if broken := (~self.scores.isfinite()).any(1).nonzero().flatten().tolist():
            raise FlexError(
                f"{self.name} gives NaN or infinite activations in its experts {broken}; expected finite ones"
            )
        if not self.energy > 0:
            raise FlexError(f"the target of {self.name} is zero on all calibration tokens, so none comes close to it")

    def unit(self, target: str) -> float:
        """Factor on the target: 1 for an output; a correction is made as long as the output, `||F|| / ||T||`."""
        return 1.0 if target == "output" else float((self.output_energy / self.energy).sqrt())

    def residuals(self, target: str) -> Tensor:
        """[E]: `sum_b ||T_b - E_i(X_b)|| / sum_b ||T_b||`; at 1 the expert is no better than nothing at all.

        A correction counts as one batch: only then does its unit, which all batches decide, come in afterwards.
        """
        if target == "output":
            return self.distance / self.length
        unit, (_, inner, energy) = self.unit(target), self.scores.unbind(-1)
        error = unit**2 * self.energy - 2 * unit * inner + energy
        return (error.clamp_min(0) / (unit**2 * self.energy)).sqrt()


class LayerFit:
    """The second pass of one layer: sums over the activations of the neurons a graft is made of, in units of the first.

    `fitted`, `held_out`: `NeuronSums` of the sequences that are fitted and of those that check it, or None.
    """

    def __init__(self, gate_up_proj: Tensor, activation: str, unit: float):
        self.gate_up_proj, self.activation, self.unit = gate_up_proj, activation, unit
        self.fitted: NeuronSums | None = None
        self.held_out: NeuronSums | None = None

    def add(self, tokens: Tokens, held_out: bool) -> None:
        if not len(tokens.target):
            return
        sums = neuron_sums(tokens.hidden_states, tokens.target, self.gate_up_proj, activation=self.activation)
        sums = NeuronSums(sums.gram, self.unit * sums.cross, self.unit**2 * sums.energy)
        name = "held_out" if held_out else "fitted"
        known = getattr(self, name)
        setattr(self, name, sums if known is None else merged(known, sums))

    def tensors(self) -> dict[str, Tensor]:
        parts = {"fitted": self.fitted, "held_out": self.held_out}
        return {f"{part}.{k}": v for part, sums in parts.items() if sums is not None for k, v in sums._asdict().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for part in ("fitted", "held_out"):
            values = {k.partition(".")[2]: v for k, v in tensors.items() if k.partition(".")[0] == part}
            setattr(self, part, NeuronSums(**values) if values else None)


def router_logits(name: str, router: Tensor, tokens: Tokens) -> Tensor:
    """[T, E]: `x.r_i`, after a look at whether the routing weights are the softmax of these at all."""
    logits = tokens.hidden_states.float() @ router.float().T
    chosen = torch.softmax(logits.gather(1, tokens.expert_indices), dim=1)
    weights = tokens.routing_weights.float()
    if not torch.allclose(weights / weights.sum(1, keepdim=True), chosen, atol=SOFTMAX_TOLERANCE):
        raise FlexError(
            f"the router of {name} weighs its experts by something else than a softmax over its weight; "
            "graft.criterion = 'renormalized' wants a softmax router"
        )
    return logits
