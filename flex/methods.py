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
CONFIGURED = "configured"  # a graft that is what the configuration says, in all its settings


@dataclass(frozen=True)
class Method:
    """One line of the comparison. `lora`: shared, personal or none. `graft`: none, `CONFIGURED`, or the criterion of a
    method that stays what it is whatever the configuration says of the graft's choice (`GraftSettings.of`).
    `rival`: what a client keeps to itself instead of a graft, see `rivals.py`; "lora", "expert" or none."""

    title: str
    lora: str | None
    graft: str | None
    rival: str | None = None


METHODS = {
    "base": Method("untrained base", lora=None, graft=None),
    "local": Method("local LoRA, nothing shared", lora="personal", graft=None),
    "fedavg": Method("FedAvg LoRA", lora="shared", graft=None),
    "flex": Method("FLEx: shared LoRA + a graft, by default of neurons", lora="shared", graft=CONFIGURED),
    "flex-paper": Method("FLEx with the paper's rule: the expert that reconstructs best", "shared", "reconstruction"),
    "flex-random": Method("control: the graft is a random expert", lora="shared", graft="random"),
    "flex-fresh": Method("control: the graft is a fresh module", lora="shared", graft="fresh"),
    "flex-private-lora": Method("control: a second, private LoRA for the graft", "shared", None, rival="lora"),
    "flex-adapt": Method("control: one expert adapted in place for the graft", "shared", None, rival="expert"),
}
ADAPTED = "routed_mass"  # the rule for `flex-adapt`: an expert that no token is routed to would not train


@dataclass(frozen=True)
class GraftSettings:
    """The personal expert: how it is chosen, what is fitted, its sigmoid gate (`opening`), and what of it trains.

    The defaults of criterion, target, refit, ridge and refit_scale are those that won in `docs/choosing-the-graft.md`;
    they hold one by one, so another criterion alone still is refitted to the correction.

    criterion: of `flex` (the other methods have their own), see `graft.py`.
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

    criterion: str = "neurons"
    experts: int = 1
    width: int = 0
    candidates: int = 0
    target: str = "correction"
    refit: bool = True
    ridge: float = 1.0
    refit_scale: float = 0.1  # fitted at full length it takes over what the shared LoRA should learn
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
                f"wanted {plain}, or graft.criterion = one of {', '.join(allowed)}",
            )
        for name in ("width", "candidates", "after_rounds"):
            require(getattr(self, name) >= 0, f"graft.{name} is {getattr(self, name)}; wanted 0 or more")
        require(
            not self.candidates or self.candidates >= self.width,
            f"graft.candidates is {self.candidates}; wanted at least the width, {self.width}",
        )
        require(
            not self.refit or self.criterion not in NEW_MODULE,
            f"graft.refit is true (its default), but {self.criterion!r} starts from nothing that could be fitted; "
            "wanted graft.refit = false",
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
        """These settings for one method. The paper's rule and the controls have their own criterion and fit nothing,
        but train as `flex` does; their size is that of `flex` as far as it can be (an expert has an expert's width)."""
        criterion = ADAPTED if method.rival == "expert" else method.graft
        if criterion in (None, CONFIGURED):
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
            gate=self.gate if criterion == "random" else "zeros",
        )

    def graft_width(self, intermediate_size: int) -> int:
        """I_g on a layer whose experts have this intermediate size."""
        return self.width or self.experts * intermediate_size

    @property
    def fits(self) -> bool:
        """Whether anything is fitted to the calibration data, so that some of them must be kept to check it."""
        return self.refit or self.criterion in ("scaled", "renormalized", "scaled_subset", "neurons")
