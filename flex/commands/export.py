"""`flex export`: what a run trained, as folders that transformers, peft and `flex_kernels` load without it."""

import shutil
from pathlib import Path

import torch

import flex_kernels
from flex.commands.saved import Saved, load_saved
from flex.errors import FlexError, first_line, require
from flex.methods import METHODS, SECOND_LORA, SHARED_LORA
from flex.model.adapters import copies, unwrap
from flex.model.partition import load_into
from flex.store.events import AFTER, METRICS, Evaluated, read_events

PLAIN = """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "this folder")
"""
MERGED = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
"""
SECOND = 'model.load_adapter("this folder/{name}", "{name}")\nmodel.base_model.set_adapter(["default", "{name}"])\n'
GRAFTS = """
import flex_kernels  # pip install flex-moe

flex_kernels.load_grafts(model, "this folder")
"""


def export(
    folder: Path, method: str, seed: int | None, client_id: str | None, target: Path, merge: bool = False
) -> int:
    """Writes the model of a method: the shared half, and with a client what that client keeps to itself.

    Args:
        target: a folder that is not there yet, or empty; it is written whole or not at all.
        merge: the base with the LoRA merged into it, instead of an adapter beside it. Grafts stay files of their own.

    Raises:
        FlexError: nothing was trained, the method has no shared half and no client is named, or the private part has no
            form outside a run.
    """
    row = METHODS.get(method)
    if row is not None:
        require(row.trains, f"{method} trains nothing, so there is nothing to export; the base is that of the run")
        require(
            row.averages or client_id is not None,
            f"{method} shares nothing: each client has a model of its own; expected --client NAME",
        )
        require(
            not row.keeps or client_id is not None,
            f"{method} averages a part of each client's LoRA, which alone is no model; expected --client NAME",
        )
        require(
            row.private != "expert" or client_id is None,
            f"{method} adapts an expert inside the base, which no adapter's file holds; expected no --client",
        )
        require(
            row.private != "expert_loras",
            f"{method} has LoRAs inside the experts, which no adapter's file holds; expected another --method",
        )
        require(
            not row.weighed or client_id is None,
            f"{method} weighs two LoRAs for each input, which no adapter's file says; expected no --client",
        )
    require(
        not target.exists() or (target.is_dir() and not any(target.iterdir())),
        f"{target} is there and not empty; expected a folder that is not there yet",
    )
    saved = load_saved(folder, method, seed, with_data=False)
    model = next(iter(saved.sites.values())).model
    if client_id is None:
        shared = {name: torch.from_numpy(array) for name, array in saved.shared.items()}
        load_into(model.parts.shared, shared, "the shared state")
    else:
        saved.attach(client_id)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _write(saved, part, client_id is not None, merge)
        text = _card(saved, folder, method, client_id, merge)
        (part / "README.md").write_text(text, encoding="utf-8")
        if target.exists():
            target.rmdir()
        part.rename(target)
    except OSError as error:
        raise FlexError(f"cannot write {target}: {first_line(error)}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(target)
    return 0


def _write(saved: Saved, folder: Path, private: bool, merge: bool) -> None:
    base, model = saved.world.base, next(iter(saved.sites.values())).model
    second = private and model.method.private == "lora"
    if private and model.method.private == "copy":  # the client's own alone answers; it is written as the only one
        own = copies(base)
        load_into({name: shared for name, (_, shared) in own.items()}, {name: p for name, (p, _) in own.items()}, "it")
    if model.method.private == "graft" and (private or model.method.module_role == "shared"):
        flex_kernels.save_grafts(base.model, folder)
    flex_kernels.detach_graft(base.model)
    if merge:
        whole = base.adapter.merge_and_unload(adapter_names=[SHARED_LORA, SECOND_LORA] if second else [SHARED_LORA])
        base.adapter = None
        whole.save_pretrained(folder)
    else:
        base.adapter.save_pretrained(
            str(folder), selected_adapters=[SHARED_LORA, SECOND_LORA] if second else [SHARED_LORA]
        )
    base.tokenizer.save_pretrained(folder)
    unwrap(base)


def _card(saved: Saved, folder: Path, method: str, client_id: str | None, merge: bool) -> str:
    """The model card: what this is, what loads it, and the scores of the run."""
    row, config = METHODS[method], saved.config
    whose = f"client `{client_id}`" if client_id is not None else "all clients: the shared half"
    load = MERGED if merge else PLAIN.format(base=config.model.path)
    said = ["Plain transformers loads it." if merge else "Plain transformers and peft load it."]
    if client_id is not None and row.private == "lora" and not merge:
        load += SECOND.format(name=SECOND_LORA)
    if row.private == "graft" and (client_id is not None or row.module_role == "shared"):
        load += GRAFTS
        said = ["The grafts need `flex_kernels`; without its last two lines this is the shared half alone."]
    elif row.private is not None and client_id is None:
        said.append("What each client keeps to itself is not here: export with --client NAME for that.")
    lines = [
        "---",
        f"base_model: {config.model.path}",
        f"library_name: {'transformers' if merge else 'peft'}",
        "---",
        "",
        f"# {row.label}, {whose}",
        "",
        f"{row.label}: {row.about}. Trained by FLEx from `{config.model.path}`, the state after round "
        f"{saved.round_index}; prompts in the template `{config.data.template}`.",
        "",
        *said,
        "",
        "```python",
        *load.rstrip().splitlines(),
        "```",
        "",
    ]
    events = read_events(saved.folder / METRICS)
    scores = {
        event.client_id: event
        for event in events
        if isinstance(event, Evaluated)
        and (event.split, event.when, event.round) == ("test", AFTER, saved.round_index)
        and client_id in (None, event.client_id)
    }
    if scores:
        lines += [
            "Scores on each client's own test part, after aggregation:",
            "",
            "| client | examples | loss | EM | ROUGE-L |",
        ]
        lines.append("|---|---|---|---|---|")
        for name, event in scores.items():
            rouge = "–" if event.rouge_l is None else f"{event.rouge_l:.3f}"
            lines.append(f"| {name} | {event.num_examples} | {event.loss:.3f} | {event.exact_match:.3f} | {rouge} |")
    return "\n".join(lines).rstrip() + "\n"
