"""The methods a run compares, and the settings of their graft: what it is made of, what is fitted, what trains."""

import dataclasses
from dataclasses import dataclass

from flex.errors import require

COMBINES = ("additive", "convex")
# How a graft is chosen, and how many neurons or experts of the layer it is then made of (`graft.py`).
WHOLE_EXPERT = ("reconstruction", "scaled", "routed_mass")
MERGED_EXPERTS = ("renormalized", "scaled_subset", "random")
NEW_MODULE = ("fresh", "zero")
CRITERIA = (*WHOLE_EXPERT, *MERGED_EXPERTS, *NEW_MODULE, "neurons")
TARGETS = ("output", "correction")


@dataclass(frozen=True)
class Method:
    """One line of the comparison. `lora`: shared, personal or none; `graft`: its criterion, or none. What `flex` says
    is the paper's, and the one that `graft.criterion` of a configuration changes; the controls stay what they are.
    `rival`: what a client keeps to itself instead of a graft, see `rivals.py`; "lora", "expert" or none."""

    title: str
    lora: str | None
    graft: str | None
    rival: str | None = None


METHODS = {
    "base": Method("untrained base", lora=None, graft=None),
    "local": Method("local LoRA, nothing shared", lora="personal", graft=None),
    "fedavg": Method("FedAvg LoRA", lora="shared", graft=None),
    "flex": Method("FLEx: shared LoRA + grafted expert", lora="shared", graft="reconstruction"),
    "flex-random": Method("control: the graft is a random expert", lora="shared", graft="random"),
    "flex-fresh": Method("control: the graft is a fresh module", lora="shared", graft="fresh"),
    "flex-private-lora": Method("control: a second, private LoRA for the graft", "shared", None, rival="lora"),
    "flex-adapt": Method("control: one expert adapted in place for the graft", "shared", None, rival="expert"),
}
ADAPTED = "routed_mass"  # the rule for `flex-adapt`: an expert that no token is routed to would not train


@dataclass(frozen=True)
class GraftSettings:
    """The personal expert: how it is chosen, what is fitted, its sigmoid gate (`opening`), and what of it trains.

    criterion: of `flex` (the controls have their own), see `graft.py`.
    experts: how many experts `renormalized`, `scaled_subset` and `random` merge into one graft of their widths' sum.
    width: of a graft of `neurons` or a new module; 0: what the experts it stands for would have.
    candidates: how many neurons survive the first pass; 0: four times the width.
    target: "output", what the layer gives (the paper), or "correction", what the loss asks it to give besides.
    refit, ridge: fits the down projection to the target, held back by ridge * the neurons' mean energy.
    refit_scale: factor on a refitted down projection.
    gate: where the vector in its sigmoid starts: "zeros", or "router", the mean router row of the grafted experts.
    training: "full", or "lora": `rank` and `alpha` on a frozen copy.
    after_rounds: so many rounds share alone; then the graft is chosen, in the function with that round's shared LoRA.
    """

    criterion: str = "reconstruction"
    experts: int = 1
    width: int = 0
    candidates: int = 0
    target: str = "output"
    refit: bool = False
    ridge: float = 1e-2
    refit_scale: float = 1.0
    gate: str = "zeros"
    combine: str = "additive"
    logit_bias: float = -4.0  # sigmoid(-4) = 0.018: training starts next to the pretrained function
    training: str = "full"
    rank: int = 8
    alpha: float = 16.0
    after_rounds: int = 0
    calibration_sequences: int = 128

    def __post_init__(self) -> None:
        for name, choices in (
            ("criterion", CRITERIA),
            ("target", TARGETS),
            ("gate", ("zeros", "router")),
            ("combine", COMBINES),
            ("training", ("full", "lora")),
        ):
            value = getattr(self, name)
            require(value in choices, f"graft.{name} is {value!r}; wanted one of {', '.join(choices)}")
        require(1 <= self.experts <= 3, f"graft.experts is {self.experts}; wanted 1, 2 or 3")
        for name, allowed, plain in (
            ("experts", (*MERGED_EXPERTS, *NEW_MODULE), 1),
            ("width", ("neurons", *NEW_MODULE), 0),
            ("candidates", ("neurons",), 0),
        ):
            value = getattr(self, name)
            require(
                value == plain or self.criterion in allowed,
                f"graft.{name} is {value}, which the criterion {self.criterion!r} has no use for; "
                f"wanted {plain}, or one of {', '.join(allowed)}",
            )
        for name in ("width", "candidates", "after_rounds"):
            require(getattr(self, name) >= 0, f"graft.{name} is {getattr(self, name)}; wanted 0 or more")
        require(
            not self.candidates or self.candidates >= self.width,
            f"graft.candidates is {self.candidates}; wanted at least the width, {self.width}",
        )
        require(
            not self.refit or self.criterion not in NEW_MODULE,
            f"graft.refit is on, but {self.criterion!r} starts from nothing that could be fitted; wanted false",
        )
        require(
            self.gate == "zeros" or self.criterion not in NEW_MODULE,
            f"graft.gate is 'router', but {self.criterion!r} grafts no expert whose router row it could take; "
            "wanted 'zeros'",
        )
        for name in ("ridge", "refit_scale", "alpha"):
            require(getattr(self, name) > 0, f"graft.{name} is {getattr(self, name)}; wanted a number above 0")
        for name in ("rank", "calibration_sequences"):
            require(getattr(self, name) >= 1, f"graft.{name} is {getattr(self, name)}; wanted 1 or more")

    def of(self, method: Method) -> "GraftSettings":
        """These settings for one method. A control has its own criterion and fits nothing, but trains as `flex` does;
        its size is that of `flex` as far as it can be (a random expert has the width of an expert)."""
        criterion = ADAPTED if method.rival == "expert" else method.graft
        if criterion in (None, METHODS["flex"].graft):
            return self
        new = criterion in NEW_MODULE
        return dataclasses.replace(
            self,
            criterion=criterion,
            experts=1 if criterion in WHOLE_EXPERT else self.experts,
            width=self.width if new else 0,
            candidates=0,
            target="output",
            refit=False,
            gate="zeros" if new else self.gate,
        )

    def graft_width(self, intermediate_size: int) -> int:
        """I_g on a layer whose experts have this intermediate size."""
        return self.width or self.experts * intermediate_size

    @property
    def fits(self) -> bool:
        """Whether anything is fitted to the calibration data, so that some of them must be kept to check it."""
        return self.refit or self.criterion in ("scaled", "renormalized", "scaled_subset", "neurons")
