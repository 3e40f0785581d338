"""One client's personal state on disk: its parameters, their optimizer's moments, SCAFFOLD's control variates."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flex.store.events import Grafted, from_json
from flex.store.files import check_header, load_tensors, round_file, rounds_in, save_tensors

KEPT_ROUNDS = 2  # of a client's personal files: the last, and the one before it for a run killed between two saves


@dataclass
class PersonalState:
    """What one client owns, by name: `parameters`, their optimizer's `moments`, SCAFFOLD's `control` variates.

    `choices`: what the last choice of its grafts says, until the server's log has it.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    control: dict[str, Tensor] = field(default_factory=dict)
    choices: list[Grafted] = field(default_factory=list)


KINDS = ("parameters", "moments", "control")


@dataclass(frozen=True)
class PersonalStore:
    """One client's personal state on disk, one file per round; the last two are kept, and that of a named round."""

    folder: Path
    header: dict[str, Any]  # what must agree: base, method, seed, client

    def load(self, at_most: int) -> PersonalState | None:
        """The newest state that is not after round `at_most`; None where there is none."""
        rounds = [r for r in rounds_in(self.folder) if r <= at_most]
        if not rounds:
            return None
        path = round_file(self.folder, rounds[-1])
        tensors, header = load_tensors(path)
        check_header(path, header, self.header)
        state = PersonalState(choices=[from_json(choice) for choice in header.get("choices", [])])
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            getattr(state, kind)[name] = tensor
        return state

    def save(self, round_index: int, state: PersonalState, kept: int | None = None) -> None:
        """Writes the state after a round.

        Args:
            kept: a round whose state stays on the disk: the newest file that is not after it.
        """
        tensors = {f"{kind}:{name}": tensor for kind in KINDS for name, tensor in getattr(state, kind).items()}
        header = {**self.header, "round": round_index, "choices": [choice.to_json() for choice in state.choices]}
        save_tensors(round_file(self.folder, round_index), tensors, header)
        self.forget(after=round_index)  # what is later is of another run, and would count as newer than this
        rounds = rounds_in(self.folder)
        of_kept = max((r for r in rounds if kept is not None and r <= kept), default=None)
        for old in rounds[:-KEPT_ROUNDS]:
            if old != of_kept:
                round_file(self.folder, old).unlink(missing_ok=True)

    def forget(self, after: int) -> None:
        """Drops the files of rounds after `after`: a run that is resumed does those rounds again."""
        for later in [r for r in rounds_in(self.folder) if r > after]:
            round_file(self.folder, later).unlink(missing_ok=True)
