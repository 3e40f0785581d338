"""Calibration: a client's own training sequences through the pretrained model, reduced to sums layer by layer.

No graft takes part, and no LoRA unless it is asked for. At every MoE layer a hook hands the batch's tokens to that
layer's sums, which add them up at once: memory is that of one batch, however many there are. The target a graft is
chosen for is

    output       F_t, what the layer's routed experts give (the paper)
    correction   -dL/dF_t, what the response loss asks them to give besides; one backward pass, the base stays frozen

The gradient is that of the summed loss, so a token counts the same whatever batch it falls in, and it is taken at the
tokens that predict a response. A gradient has no length of its own: `layer_sums.py` makes it as long as the output.

A pass that is killed goes on from its last file to the same bits.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flex.data.examples import IGNORED, Batch, Encoder, Example
from flex.errors import FlexError
from flex.evaluation.score import response_logits, run_layers
from flex.model.adapters import pretrained_only
from flex.model.base import Base
from flex.store.files import load_tensors, save_tensors

SAVE_EVERY = 8  # batches between two files of the sums
HELD_OUT = 8  # one sequence in so many is kept to check what was fitted

Progress = Callable[[str, int, int], None]  # what is being done, batches done, batches in all


@dataclass(frozen=True)
class Tokens:
    """What one MoE layer made of a batch's T tokens, padding left out: `hidden_states`, `output` (F) and `target`
    [T, H], `expert_indices` and `routing_weights` [T, K]."""

    hidden_states: Tensor
    output: Tensor
    target: Tensor
    expert_indices: Tensor
    routing_weights: Tensor


class Sums(Protocol):
    """What a pass keeps of one layer. Its tensors are all of its state, so that a killed pass can go on."""

    def add(self, tokens: Tokens, held_out: bool) -> None: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def load(self, tensors: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Sequences:
    """Calibration sequences in batches: those a graft is fitted to, and those that check it."""

    fitted: Sequence[Example]
    held_out: Sequence[Example]
    batch_size: int

    @classmethod
    def of(cls, examples: Sequence[Example], batch_size: int, hold_out: bool) -> "Sequences":
        """The last eighth is held out, of fewer than eight sequences nothing.

        Raises:
            FlexError: no sequences, or an empty one.
        """
        if not examples:
            raise FlexError("there are no calibration sequences; expected at least one training example")
        for index, example in enumerate(examples):
            if not example.input_ids:
                raise FlexError(f"calibration sequence {index} has no tokens; expected text of at least one token")
        count = len(examples) // HELD_OUT if hold_out else 0
        cut = len(examples) - count
        return cls(examples[:cut], examples[cut:], batch_size)

    def batches(self) -> list[tuple[Sequence[Example], bool]]:
        """(examples, whether they are held out)."""
        return [
            (part[start : start + self.batch_size], held_out)
            for part, held_out in ((self.fitted, False), (self.held_out, True))
            for start in range(0, len(part), self.batch_size)
        ]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for examples, held_out in self.batches():
            digest.update(repr([(held_out, e.input_ids, e.prompt_length, *e.earlier) for e in examples]).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Calibration:
    """What a client's grafts are chosen by: its sequences, and the model that reads them.

    examples: the client's training sequences; never test data.
    folder: for the files that a killed calibration goes on from; None keeps none.
    progress: called after each batch.
    lora: a name for the values of the LoRA that stays at work; empty: none does.
    """

    base: Base
    encoder: Encoder
    examples: Sequence[Example]
    batch_size: int
    folder: Path | None = None
    progress: Progress = lambda what, done, total: None
    lora: str = ""

    def run_pass(
        self, sequences: Sequences, sums: Mapping[str, Sums], target: str, settings: Mapping[str, Any], number: int
    ) -> None:
        """Adds every batch of `sequences` to the `sums` of every layer.

        Args:
            target: "output" or "correction".
            settings: what else decides the sums; a file of other settings, data or base is not gone on from.
            number: of the pass; its file is written every `SAVE_EVERY` batches and at the end.

        Raises:
            FlexError: activations or gradients that are not finite.
        """
        path = None if self.folder is None else self.folder / f"calibration-{number}.safetensors"
        batches = sequences.batches()
        key = _key(self.base, sequences, {"target": target, "lora": self.lora, "pass": number, **settings})
        done = _resume(path, key, sums, self.base.device)
        layers = {name: self.base.layers[name] for name in sums}
        with pretrained_only(self.base, keep_lora=bool(self.lora)) as model:
            for index, (examples, held_out) in enumerate(batches):
                if index < done:
                    continue
                batch = self.encoder.batch(examples, self.base.device)
                _show(model, layers, batch, target, lambda name, tokens, h=held_out: sums[name].add(tokens, h))
                done = index + 1
                if path is not None and (done % SAVE_EVERY == 0 or done == len(batches)):
                    tensors = {f"{name}:{part}": t for name, own in sums.items() for part, t in own.tensors().items()}
                    save_tensors(path, tensors, {"key": key, "batches": done})
                self.progress(f"calibrating on the layers' {target}", done, len(batches))


def _key(base: Base, sequences: Sequences, settings: Mapping[str, Any]) -> str:
    text = json.dumps([base.fingerprint, sequences.fingerprint(), dict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _resume(path: Path | None, key: str, sums: Mapping[str, Sums], device: torch.device) -> int:
    """Loads the sums of a file that fits; returns how many batches they hold."""
    if path is None or not path.exists():
        return 0
    tensors, header = load_tensors(path)
    if header.get("key") != key:
        return 0
    for name, own in sums.items():
        prefix = f"{name}:"
        own.load({k.removeprefix(prefix): t.to(device) for k, t in tensors.items() if k.startswith(prefix)})
    return header["batches"]


def _show(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch, target: str, visit: Callable[[str, Tokens], None]
) -> None:
    """Runs the model on a batch and calls `visit` for every layer: after the layer itself for its output, when the
    backward pass comes by for a correction."""
    rows = batch.attention_mask.bool()
    if target == "correction":  # the tokens whose successor is one of the response
        rows = F.pad(batch.labels[:, 1:] != IGNORED, (0, 1))
    rows = rows.flatten()

    def keep(name: str, inputs: tuple[Tensor, ...], output: Tensor, toward: Tensor, what: str) -> None:
        tokens = Tokens(*(t.detach()[rows] for t in (inputs[0], output, toward, *inputs[1:])))
        for values in (tokens.hidden_states, tokens.output, tokens.target):
            if not torch.isfinite(values).all():
                raise FlexError(f"{name} gives NaN or infinite {what} on the calibration data; nothing can be scored")
        with torch.no_grad():
            visit(name, tokens)

    def after_layer(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if target == "output":
            keep(name, inputs, output, output, "activations")
        else:
            # Without the graph: a hook that captures its own tensor is a reference cycle that is never freed.
            inputs, output_alone = tuple(t.detach() for t in inputs), output.detach()
            output.register_hook(lambda grad: keep(name, inputs, output_alone, -grad, "activations or gradients"))

    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output, name=name: after_layer(name, inputs, output))
        for name, layer in layers.items()
    ]
    if target == "correction":  # nothing in the base is trained: a gradient must start somewhere to pass the layers
        embeddings = model.get_input_embeddings()
        hooks.append(embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True)))
    try:
        with torch.set_grad_enabled(target == "correction"):
            if target == "output":
                run_layers(model, batch)
            else:
                logits, labels, _ = response_logits(model, batch)
                F.cross_entropy(logits.float(), labels, reduction="sum").backward()
    finally:
        for hook in hooks:
            hook.remove()
