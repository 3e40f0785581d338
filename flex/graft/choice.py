"""What was chosen for one layer, and what is told of it: the `graft` event of a run."""

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from flex.store.events import Grafted


@dataclass(frozen=True)
class Parts:
    """What a graft is made of: neurons `ids` [n] (`e * I + j`) of a layer, `scales` [n] on their down columns, and the
    whole `experts` among them. Without ids it is a new module."""

    ids: Tensor
    scales: Tensor
    experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Unexplained:
    """Shares of ||T||^2 that a graft leaves: 0 is perfect, 1 no better than nothing. `held_out_*` are of sequences that
    nothing was fitted to; `*after`, with the refitted down projection (before `refit_scale`)."""

    before: float | None = None
    after: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None


@dataclass(frozen=True)
class Choice:
    """The graft of one layer, and why. `residuals`: the relative residual of every expert alone; `neurons`: how many
    of each expert went into the graft; `curve`: [width, share unexplained]; `down_proj` [H, width] where refitted."""

    layer: int
    module: str
    criterion: str
    target: str
    residuals: list[float]
    routed_mass: float
    seconds: float
    parts: Parts
    neurons: list[int]
    width: int
    unexplained: Unexplained
    curve: list[list[float]]
    down_proj: Tensor | None = None
    peak_bytes: int = 0

    @property
    def chosen(self) -> int | None:
        """The one expert that was copied; None for several, for neurons and for a new module."""
        return self.parts.experts[0] if len(self.parts.experts) == 1 else None

    @property
    def residual(self) -> float | None:
        return None if self.chosen is None else self.residuals[self.chosen]

    def event(self, client_id: str, round_index: int) -> Grafted:
        """What a run's log tells of it."""
        told = {f.name for f in dataclasses.fields(Grafted)}
        own = {name: value for name, value in vars(self).items() if name in told and name != "unexplained"}
        return Grafted(
            **own,
            client_id=client_id,
            round=round_index,
            candidates=self.residuals,
            chosen=self.chosen,
            residual=self.residual,
            experts=list(self.parts.experts),
            unexplained=vars(self.unexplained),
        )
