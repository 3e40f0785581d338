"""The Trainer keeps a model's grafts: in every checkpoint, at the end, and back again when it resumes.

transformers is imported by `graft_callback` alone, and only when it is called.
"""

import uuid
from pathlib import Path
from typing import Any

from torch import nn

from flex_kernels.graft_files import TENSORS, Folder, grafts_of, load_grafts, read_grafts, write_grafts
from flex_kernels.graft_watch import know_saving

NAME = "GraftCallback"  # under which a checkpoint's trainer_state.json has the callback's state


def graft_callback(resume_from: Folder | None = None) -> Any:
    """A callback for `transformers.Trainer`, and all that is made of it (TRL), that saves grafts and brings them back.

        Trainer(model, ..., callbacks=[flex_kernels.graft_callback()])

    Every checkpoint gets the files of `save_grafts`, and so does `output_dir` at the end, where the best checkpoint's
    grafts are loaded if `load_best_model_at_end` says so. `trainer.train(resume_from_checkpoint=...)` finds them again.
    The Trainer does not tell a callback where it resumes from, so checkpoint and grafts carry a number in common. The
    places looked at are `resume_from`, `args.resume_from_checkpoint`, `output_dir/checkpoint-<step>` and the folder
    in which the checkpoint was written. The optimizer's state of the grafts is in the Trainer's own file.

    Args:
        resume_from: the checkpoint's folder, needed only where it was moved out of `output_dir`.

    Returns:
        A `transformers.TrainerCallback`. It raises a ValueError when the model has no grafts as training begins, when a
        checkpoint is resumed whose grafts are not found, and in a hyperparameter search.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers.trainer_callback import ExportableState, TrainerCallback

    class GraftCallback(TrainerCallback, ExportableState):
        def __init__(self, resume_from: Folder | None = None) -> None:
            self.resume_from, self.checkpoint, self.folder = resume_from, "", ""

        def state(self) -> dict[str, Any]:
            """What goes into trainer_state.json: the Trainer asks right before it calls `on_save`."""
            self.checkpoint = uuid.uuid4().hex
            return {"args": {}, "attributes": {"checkpoint": self.checkpoint, "folder": self.folder}}

        def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
            if model is not None:
                know_saving(grafts_of(model))

        def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            grafts = grafts_of(model)
            if not grafts:
                raise ValueError(f"{type(model).__name__} carries no graft for graft_callback() to save")
            if state.is_hyper_param_search:
                raise ValueError("graft_callback() cannot tell the trials of a hyperparameter search apart")
            know_saving(grafts)
            if state.global_step > 0:
                load_grafts(model, _checkpoint(self.resume_from, args, state))
            self.folder = str(Path(args.output_dir).resolve())

        def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_grafts(model, folder, write=args.should_save, checkpoint=self.checkpoint)

        def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                load_grafts(model, state.best_model_checkpoint)
            write_grafts(model, args.output_dir, write=args.should_save)

    return GraftCallback(resume_from)


def _checkpoint(resume_from: Folder | None, args: Any, state: Any) -> Path:
    """Where the grafts are that belong to the checkpoint whose trainer state this is."""
    own = state.stateful_callbacks.get(NAME)
    if own is None:
        raise ValueError("the checkpoint was written without graft_callback(), so grafts may be missing from it")
    own, step = own["attributes"], f"checkpoint-{state.global_step}"
    folders = [resume_from, args.resume_from_checkpoint, Path(args.output_dir) / step, Path(own["folder"]) / step]
    folders = [Path(folder) for folder in folders if folder is not None]
    for folder in folders:
        if (folder / TENSORS).is_file() and read_grafts(folder)[0].get("checkpoint") == own["checkpoint"]:
            return folder
    looked = ", ".join(map(str, dict.fromkeys(folders)))
    raise ValueError(f"the grafts of this checkpoint are not in {looked}; graft_callback(resume_from=its folder) helps")
