"""Choose and build one client's grafts from its own training sequences.

One pass over them scores the pretrained experts of every MoE layer against the target T (`calibrate.py`):

    reconstruction   argmin_i sum_b ||T(X_b) - E_i(X_b)||                          the paper's rule (arXiv 2506.00965)
    scaled           argmin_i min_c ||T - c E_i||^2                                c goes into the down projection
    routed_mass      the expert that the client's tokens are routed to most
    renormalized     r experts, the router's softmax over them alone               the graft is their mean
    scaled_subset    argmin_{C, c} ||T - sum_{i in C} c_i E_i||^2, |C| = r         the constants go into the graft
    neurons          the best few of all experts' neurons, picked greedily         the same, neuron by neuron
    random           r experts, drawn; the graft is their mean                     control
    fresh, zero      nothing pretrained: weights of the same spread as the experts', `zero` with a down projection of 0

Criteria that fit something, and every refit of the down projection, hold out the last eighth of the sequences and
report how much of the target stays unexplained on it. That, and the choice of neurons, takes a second pass (several,
over some layers each, if their Gram matrices are large).
"""

import random
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import flex_kernels
from flex.errors import FlexError
from flex.graft.calibrate import Calibration, Sequences
from flex.graft.choice import Choice, Parts, Unexplained
from flex.graft.sums import LayerFit, LayerScores
from flex.methods import NEW_MODULE, GraftSettings
from flex.model.base import Base, can_be_taken_apart, experts_sizes, router_of, weights_of
from flex_kernels import NeuronSums
from flex_kernels.selection.one_expert import best_scales

CURVE_POINTS = 50
FIT_BYTES = 2**32  # of a second pass's sums: layers that need more have passes of their own
POOL = 4  # candidates for each neuron of the graft, where the settings do not say how many


def choose_grafts(calibration: Calibration, settings: GraftSettings, seed: str) -> list[Choice]:
    """One choice per layer, from calibration to refit.

    Args:
        seed: of what is drawn.

    Raises:
        FlexError: see `check`, `calibrate.py` and `LayerScores.check`.
    """
    started = time.perf_counter()
    base = calibration.base
    check(base, settings)
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    if settings.criterion in NEW_MODULE and not all(map(can_be_taken_apart, base.layers.values())):
        return [_unscored(index, name, layer, settings) for index, (name, layer) in enumerate(base.layers.items())]
    sequences = Sequences.of(calibration.examples, calibration.batch_size, settings.fits)
    decides: dict[str, Any] = {"criterion": settings.criterion, "experts": settings.experts}

    scores = {name: LayerScores(base, name, settings) for name in base.layers}
    calibration.run_pass(replace(sequences, held_out=[]), scores, settings.target, decides, 0)
    for layer in scores.values():
        layer.check()
    rng = random.Random(seed)
    parts = {name: _choose(layer, settings, rng) for name, layer in scores.items()}
    decides["ids"] = [part.ids.tolist() for part in parts.values()]
    before = (time.perf_counter() - started) / len(scores)
    choices: list[Choice] = []
    groups = _groups(scores, parts) if settings.fits else [list(scores)]
    for number, names in enumerate(groups, 1):
        started = time.perf_counter()
        fits = {name: _fit(scores[name], parts[name], settings) for name in names} if settings.fits else {}
        if fits:
            calibration.run_pass(sequences, fits, settings.target, decides, number)
        found = [
            _finish(len(choices) + i, scores[name], parts[name], fits.get(name), settings)
            for i, name in enumerate(names)
        ]
        seconds = before + (time.perf_counter() - started) / len(names)
        choices += [Choice(**own, seconds=seconds, peak_bytes=peak_bytes(base.device)) for own in found]
    if calibration.folder is not None:
        for file in calibration.folder.glob("calibration-*.safetensors"):
            file.unlink()
    return choices


def _unscored(index: int, name: str, layer: nn.Module, settings: GraftSettings) -> Choice:
    """A new module where the pretrained experts cannot be scored (GPT-OSS: biases, interleaved rows)."""
    return Choice(
        layer=index,
        module=name,
        criterion=settings.criterion,
        target=settings.target,
        residuals=[],
        routed_mass=0.0,
        seconds=0.0,
        parts=Parts(torch.empty(0, dtype=torch.int64), torch.empty(0)),
        neurons=[],
        width=settings.graft_width(experts_sizes(layer)[1]),
        unexplained=Unexplained(),
        curve=[],
    )


def new_modules(base: Base, settings: GraftSettings) -> list[Choice]:
    """The "choice" of a new module in every layer: nothing is scored, and no data are looked at."""
    return [_unscored(index, name, layer, settings) for index, (name, layer) in enumerate(base.layers.items())]


def _groups(scores: dict[str, LayerScores], parts: dict[str, Parts]) -> list[list[str]]:
    """The layers, in order, in groups whose sums of a second pass take at most `FIT_BYTES` together, if one does."""
    groups: list[list[str]] = []
    held = 0
    for name, part in parts.items():
        num_neurons, hidden_size = len(part.ids), scores[name].down_proj.shape[1]
        own = 2 * 8 * num_neurons * (num_neurons + hidden_size)  # fp64, fitted and held out
        if not groups or held + own > FIT_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += own
    return groups


def _fit(layer: LayerScores, parts: Parts, settings: GraftSettings) -> LayerFit:
    gate_up, _ = flex_kernels.gather_neurons(layer.gate_up_proj, layer.down_proj, parts.ids)
    return LayerFit(gate_up, layer.activation, layer.unit(settings.target))


def check(base: Base, settings: GraftSettings) -> None:
    """Checks that every layer can provide what the settings ask for; raises FlexError."""
    for name, layer in base.layers.items():
        if settings.criterion in NEW_MODULE and not can_be_taken_apart(layer):
            continue  # a new module needs nothing of the experts but their sizes
        num_experts, _, intermediate_size = weights_of(name, layer).down_proj.shape
        if settings.experts > num_experts:
            raise FlexError(f"graft.experts is {settings.experts}; expected at most {num_experts}, all that {name} has")
        if settings.criterion == "neurons":
            for key, value in (("width", settings.width), ("candidates", settings.candidates)):
                if value > num_experts * intermediate_size:
                    raise FlexError(
                        f"graft.{key} is {value}; expected at most {num_experts * intermediate_size}, "
                        f"all neurons of {name}"
                    )
            if settings.candidates and settings.candidates < settings.graft_width(intermediate_size):
                raise FlexError(
                    f"graft.candidates is {settings.candidates}; expected at least the graft's width at {name}, "
                    f"{settings.graft_width(intermediate_size)}"
                )
        if settings.gate == "router":
            router_of(base, name)


def _choose(layer: LayerScores, settings: GraftSettings, rng: random.Random) -> Parts:
    """What the first pass says. For neurons: the candidates, of which a second pass picks."""
    num_experts, _, intermediate_size = layer.down_proj.shape
    device = layer.down_proj.device
    if settings.criterion in NEW_MODULE:
        return Parts(torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, device=device))
    if settings.criterion == "neurons":
        width = settings.graft_width(intermediate_size)
        count = min(settings.candidates or POOL * width, num_experts * intermediate_size)
        ids = flex_kernels.prefilter(layer.neuron_energy, layer.neuron_correlation, count)
        return Parts(ids, torch.ones(count, device=device))
    unit, one = layer.unit(settings.target), layer.scores[None]
    residuals = layer.residuals(settings.target)
    scales: Sequence[float] = (1.0,)
    if settings.criterion == "random":
        experts = sorted(rng.sample(range(num_experts), settings.experts))
        scales = [1 / settings.experts] * settings.experts
    elif settings.criterion == "renormalized":
        experts = list(layer.subsets.best().experts)
        scales = [1 / settings.experts] * settings.experts
    elif settings.criterion == "scaled_subset":
        subset = flex_kernels.best_scaled_subset(layer.gram, settings.experts)
        experts, scales = list(subset.experts), [unit * scale for scale in subset.scales]
    else:
        component_scores = {
            "reconstruction": residuals,
            "scaled": flex_kernels.scaled(one),
            "routed_mass": -layer.routed_mass,
        }[settings.criterion]
        experts = [flex_kernels.choose(component_scores)]
        if settings.criterion == "scaled":
            scales = [unit * float(best_scales(one)[experts[0]])]
    ids = torch.cat([torch.arange(e * intermediate_size, (e + 1) * intermediate_size) for e in experts])
    columns = torch.tensor(scales).repeat_interleave(intermediate_size)
    return Parts(ids.to(device), columns.to(device), tuple(experts))


def _finish(
    index: int, layer: LayerScores, parts: Parts, fit: LayerFit | None, settings: GraftSettings
) -> dict[str, Any]:
    """The fields of a `Choice`: with a second pass the neurons are picked, the refit is made and the rest measured."""
    num_experts, _, intermediate_size = layer.down_proj.shape
    residuals = layer.residuals(settings.target)
    mass = layer.routed_mass / layer.routed_mass.sum()
    width = len(parts.ids) or settings.graft_width(intermediate_size)
    down_proj, unexplained, curve = None, Unexplained(), []
    if fit is not None:
        parts, curve = _pick(layer, parts, fit, settings)
        down = _columns(layer, parts)
        unexplained, down_proj = _refit(fit, down, settings)
        width = len(parts.ids)
    elif parts.experts:  # a whole expert as it is
        unexplained = Unexplained(before=_left(layer, parts, settings))
    if not curve and unexplained.before is not None:
        curve = [[0, 1.0], [width, round(unexplained.before, 6)]]
    counts = torch.bincount(parts.ids // intermediate_size, minlength=num_experts)
    return {
        "layer": index,
        "module": layer.name,
        "criterion": settings.criterion,
        "target": settings.target,
        "residuals": [round(float(r), 6) for r in residuals],
        "routed_mass": float((mass * counts).sum() / intermediate_size),
        "parts": parts,
        "neurons": counts.tolist(),
        "width": width,
        "unexplained": unexplained,
        "curve": curve,
        "down_proj": down_proj,
    }


def _left(layer: LayerScores, parts: Parts, settings: GraftSettings) -> float | None:
    """The share of the target that one expert as it is leaves; several together were not looked at."""
    if len(parts.experts) != 1:
        return None
    unit, (_, inner, energy) = layer.unit(settings.target), layer.scores[parts.experts[0]]
    whole = unit**2 * layer.energy
    return float((whole - 2 * unit * inner + energy).clamp_min(0) / whole)


def _pick(layer: LayerScores, parts: Parts, fit: LayerFit, settings: GraftSettings) -> tuple[Parts, list[list[float]]]:
    """Neurons: the greedy choice among the candidates and what is left at every width; `fit` keeps their sums."""
    if settings.criterion != "neurons":
        return parts, []
    width = settings.graft_width(layer.down_proj.shape[2])
    picked = flex_kernels.greedy_neurons(fit.fitted, _columns(layer, parts), width)
    for part in ("fitted", "held_out"):
        sums = getattr(fit, part)
        if sums is not None:
            rows = sums.gram[picked.order]
            setattr(fit, part, NeuronSums(rows[:, picked.order], sums.cross[picked.order], sums.energy))
    left = (picked.losses / picked.losses[0]).tolist()
    step = max(1, -(-width // (CURVE_POINTS - 1)))
    widths = sorted({*range(0, width, step), width})
    return Parts(parts.ids[picked.order], picked.scales.float()), [[w, round(left[w], 6)] for w in widths]


def _columns(layer: LayerScores, parts: Parts) -> Tensor:
    """[H, n] fp32: the pretrained down columns times their constants."""
    _, down = flex_kernels.gather_neurons(layer.gate_up_proj, layer.down_proj, parts.ids)
    return down.float() * parts.scales


def _refit(fit: LayerFit, down: Tensor, settings: GraftSettings) -> tuple[Unexplained, Tensor | None]:
    after = held_before = held_after = refitted = None
    before = flex_kernels.unexplained(fit.fitted, down)
    if settings.refit:
        refit = flex_kernels.refit_down(fit.fitted, down, settings.ridge)
        refitted, after = refit.down_proj * settings.refit_scale, refit.after
    if fit.held_out is not None and fit.held_out.energy > 0:
        held_before = flex_kernels.unexplained(fit.held_out, down)
        held_after = flex_kernels.unexplained(fit.held_out, refit.down_proj) if settings.refit else None
    return Unexplained(before, after, held_before, held_after), refitted


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: on a GPU what torch held since the calibration began, else what the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
