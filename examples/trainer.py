"""transformers.Trainer fine-tunes grafts on frozen experts; a checkpoint is resumed to the same weights, bit for bit.

    python examples/trainer.py

When it resumes, the Trainer says that the keys of the experts are missing: checkpoints name them in the older way, one
expert at a time, and it loads a checkpoint key by key. Frozen experts need no loading; what trains is found.
"""

import tempfile

import tiny_moe
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

import flex_kernels


def grafted_model() -> PreTrainedModel:
    model = tiny_moe.model()
    model.requires_grad_(False)
    torch.manual_seed(1)
    for graft in flex_kernels.attach_graft(model, width=16, logit_bias=0.0).values():
        graft.reset_parameters()
    return model


def train(folder: str, resume_from: str | None = None) -> Trainer:
    data = [{"input_ids": ids, "labels": ids} for ids in tiny_moe.sequences(64)]
    settings = TrainingArguments(
        folder,
        max_steps=20,
        save_steps=10,
        logging_steps=5,
        per_device_train_batch_size=8,
        learning_rate=0.03,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    # It saves the grafts in files of their own: the Trainer keeps them where it keeps the whole model, not with peft.
    callbacks = [flex_kernels.graft_callback()]
    trainer = Trainer(grafted_model(), settings, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def main() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        whole = train(folder)
        resumed = train(folder, resume_from=f"{folder}/checkpoint-10")
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    ours, theirs = (dict(trainer.model.named_parameters()) for trainer in (whole, resumed))
    difference = max(float((ours[name] - theirs[name]).detach().abs().max()) for name in ours)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; resumed from step 10, the weights differ by {difference}")
    return {"first_loss": losses[0], "last_loss": losses[-1], "difference": difference}


if __name__ == "__main__":
    main()
