"""The methods a run compares, and the settings of the graft.

A method is one declared row, which the trainer, the report and the command line all read.

To add a method, add a row to `METHODS`. Code never asks for a method by its name, it asks the row: what is shared, what
is kept, where it starts, in which phases it trains, for a control which method it is compared with.
"""

import dataclasses
from dataclasses import dataclass

from flex.errors import require
from flex.settings import check, setting

COMBINES = ("additive", "convex")
# How a graft is chosen, and how many neurons or experts of the layer it is then made of (`graft/choose.py`).
WHOLE_EXPERT = ("reconstruction", "scaled", "routed_mass")
MERGED_EXPERTS = ("renormalized", "scaled_subset", "random")
NEW_MODULE = ("fresh", "zero")
CRITERIA = (*WHOLE_EXPERT, *MERGED_EXPERTS, *NEW_MODULE, "neurons")
TARGETS = ("output", "correction")
CONFIGURED = "configured"  # the method uses [graft] of the configuration unchanged
LORAS = ("shared", "personal")
KEEPS = ("B", "upper")
PRIVATES = ("graft", "lora", "copy", "expert", "expert_loras")
SHARED_LORA, SECOND_LORA = "default", "private"  # the LoRA that everyone has, and one beside it, as peft names them


@dataclass(frozen=True)
class Phase:
    """Local steps of one turn.

    trains: the roles of the parameters that move (`model/partition.py`).
    loras: which LoRAs are at work meanwhile; empty: all there are.
    held: the second LoRA is held to the shared values of the turn's start by `train.copy_mu / 2 ||v - w||²`.
    """

    trains: tuple[str, ...]
    loras: tuple[str, ...] = ()
    held: bool = False


JOINT = (Phase(("shared", "personal")),)  # everything at once, as FLEx does


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    label, about: its name in tables, and what it is in one line.
    lora: the LoRA on attention is "shared" (averaged), "personal" (never sent), or None (there is none).
    keeps: what of a shared LoRA stays with its client all the same: every matrix "B", the LoRA of the "upper" half of
        the layers, or "" for nothing.
    private: what a client has besides: a "graft", a second "lora", a "copy" of the shared LoRA, an "expert" adapted in
        place, LoRAs on all experts ("expert_loras"), or None.
    module_role: of that module: "personal" (it stays with its client) or "shared" (it is averaged as well).
    start: what a graft or adapted expert starts from: `CONFIGURED`, or a criterion that stays what it is whatever the
        configuration says of the graft's choice (`GraftSettings.of`).
    phases: of a client's turn, in order, with equal shares of its steps; empty: nothing trains.
    last_phases: of a turn in the last `train.finetune_rounds` rounds, in which nothing is averaged; empty: as all.
    loras: which LoRAs answer when a client is scored; empty: all there are.
    weighed: the two LoRAs are weighed against each other: halves in training, by the likeness of the input to the
        client's own data when it is scored.
    strategy: of the server; empty: that of the configuration (section [strategy]).
    control_of: for a control, the method that it is compared with; the two differ in the private part alone.
    in_place, unproven: for a control, what stands in place of the graft, and what a run fails to show if that does as
        well.
    capacity: whether the control separates a good choice from mere private capacity.
    in_words: its name within a sentence; empty: the label.
    """

    label: str
    about: str
    lora: str | None = "shared"
    keeps: str = ""
    private: str | None = None
    module_role: str = "personal"
    start: str | None = None
    phases: tuple[Phase, ...] = JOINT
    last_phases: tuple[Phase, ...] = ()
    loras: tuple[str, ...] = ()
    weighed: bool = False
    strategy: str = ""
    control_of: str = ""
    in_place: str = ""
    unproven: str = ""
    capacity: bool = False
    in_words: str = ""

    def __post_init__(self) -> None:
        for name, choices in (
            ("lora", (None, *LORAS)),
            ("keeps", ("", *KEEPS)),
            ("private", (None, *PRIVATES)),
            ("module_role", ("personal", "shared")),
        ):
            value = getattr(self, name)
            require(value in choices, f"a method's {name} is {value!r}; expected one of {choices}")
        require((self.start is not None) == (self.private in ("graft", "expert")), "a graft or expert needs a start")
        require(
            self.module_role == "personal" or self.start is None or self.start in NEW_MODULE,
            f"a shared graft that starts as {self.start!r} would be chosen on one client's data; expected a new module",
        )

    @property
    def trains(self) -> bool:
        return bool(self.phases)

    @property
    def chooses(self) -> bool:
        """Whether each client chooses on its own data what its module starts from."""
        return self.start is not None and self.module_role == "personal"

    @property
    def averages(self) -> bool:
        """Whether the server aggregates anything: else before and after aggregation are the same weights."""
        return self.lora == "shared"

    @property
    def sentence_name(self) -> str:
        return self.in_words or self.label


def _averaged(label: str, strategy: str) -> Method:
    return Method(label, f"as FedAvg, aggregated by {label}", strategy=strategy)


MAIN = "flex"  # the method that the report compares every other one with
AVERAGED = "fedavg"  # the same without anything private
# In the order of the tables.
METHODS = {
    "base": Method("Base model", "as it came, not trained here", lora=None, phases=(), in_words="the untrained base"),
    "local": Method("Local", "each client alone, nothing is sent", lora="personal", in_words="local training"),
    "fedavg": Method("FedAvg", "one averaged LoRA for all, nothing private"),
    "fedprox": _averaged("FedProx", "fedprox"),
    "scaffold": _averaged("SCAFFOLD", "scaffold"),
    "fedavgm": _averaged("FedAvgM", "fedavgm"),
    "fedadagrad": _averaged("FedAdagrad", "fedadagrad"),
    "fedyogi": _averaged("FedYogi", "fedyogi"),
    "fedadam": _averaged("FedAdam", "fedadam"),
    "flex": Method(
        "FLEx",
        "averaged LoRA + a private module of pretrained neurons, fitted to what the loss asks for",
        private="graft",
        start=CONFIGURED,
    ),
    "flex-paper": Method(
        "Paper's rule",
        "FLEx, but the private expert is the one that reconstructs best",
        private="graft",
        start="reconstruction",
        control_of="flex",
        in_place="the paper's rule",
        unproven="that this graft is better than the paper's",
    ),
    "flex-random": Method(
        "Random expert",
        "control: FLEx, but the expert is drawn at random",
        private="graft",
        start="random",
        control_of="flex",
        in_place="a random expert",
        unproven="that it matters what is grafted",
        capacity=True,
    ),
    "flex-fresh": Method(
        "Fresh module",
        "control: FLEx, but the private module is newly initialised",
        private="graft",
        start="fresh",
        control_of="flex",
        in_place="a fresh module",
        unproven="that starting from pretrained weights matters",
        capacity=True,
    ),
    "flex-private-lora": Method(
        "Private LoRA",
        "control: a second, private LoRA in place of the private module",
        private="lora",
        control_of="flex",
        in_place="a private LoRA",
        unproven="that a graft is better than a private LoRA",
    ),
    "flex-adapt": Method(
        "Adapted expert",
        "control: one pretrained expert adapted in place of the private module",
        private="expert",
        start="routed_mass",  # an expert that no token is routed to would not train
        control_of="flex",
        in_place="an expert adapted in place",
        unproven="that a graft is better than adapting an expert",
    ),
    "fedavg-finetune": Method(
        "FedAvg + tuning",
        "FedAvg, then a client's copy of the averaged LoRA trains on its own data in the last rounds",
        private="copy",
        phases=(Phase(("shared",), (SHARED_LORA,)),),
        last_phases=(Phase(("personal",), (SECOND_LORA,)),),
        loras=(SECOND_LORA,),
        in_words="FedAvg with local fine-tuning",
    ),
    "fedsa": Method("FedSA-LoRA", "the matrices A of the LoRA are averaged, the matrices B stay", keeps="B"),
    "fedper": Method("FedPer", "the LoRA of the lower layers is averaged, that of the upper half stays", keeps="upper"),
    "fedrep": Method(
        "FedRep",
        "FLEx's parts in FedRep's order: first the private module alone, then the shared LoRA alone",
        private="graft",
        start=CONFIGURED,
        phases=(Phase(("personal",)), Phase(("shared",))),
        in_words="FedRep's order",
    ),
    "ditto": Method(
        "Ditto",
        "an averaged LoRA, and a client's own of equal rank that is held to it and alone answers",
        private="copy",
        phases=(Phase(("personal",), (SECOND_LORA,), held=True), Phase(("shared",), (SHARED_LORA,))),
        loras=(SECOND_LORA,),
    ),
    "feddpa": Method(
        "FedDPA",
        "an averaged and a private LoRA in turn, weighed for each input by its likeness to the client's data",
        private="lora",
        phases=(Phase(("shared",)), Phase(("personal",))),
        weighed=True,
    ),
    "flexlora": Method(
        "FlexLoRA",
        "LoRAs of unequal rank: their products are averaged, and cut to each client's rank",
        strategy="flexlora",
    ),
    "shared-graft": Method(
        "Shared expert",
        "FLEx's capacity without its privacy: one new expert per layer, averaged as the LoRA is",
        private="graft",
        module_role="shared",
        start="fresh",
        in_words="an averaged expert",
    ),
    "fedavg-experts": Method(
        "Expert LoRA",
        "averaged LoRA on attention and on every expert, an expert's weighed by the tokens routed to it",
        private="expert_loras",
        module_role="shared",
        strategy="by_tokens",
        in_words="averaged LoRA on all experts",
    ),
}
DEFAULT_METHODS = ("base", "local", "fedavg", "flex", "flex-paper", "flex-random", "flex-fresh")


@dataclass(frozen=True)
class GraftSettings:
    """The personal expert: how it is chosen, what is fitted, its sigmoid gate (`opening`), and what of it trains.

    The defaults of criterion, target, refit, ridge and refit_scale are those that won in `docs/choosing-the-graft.md`;
    each default is independent: changing the criterion alone keeps refit and target.

    criterion: of `flex` (the other methods have their own), see `graft/choose.py`.
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

    criterion: str = setting("neurons", choices=CRITERIA)
    experts: int = 1
    width: int = setting(0, least=0)
    candidates: int = setting(0, least=0)
    target: str = setting("correction", choices=TARGETS)
    refit: bool = True
    ridge: float = setting(1.0, above=0)
    refit_scale: float = setting(0.1, above=0)  # fitted at full length it takes over what the shared LoRA should learn
    gate: str = setting("zeros", choices=("zeros", "router"))
    combine: str = setting("additive", choices=COMBINES)
    logit_bias: float = -4.0  # sigmoid(-4) = 0.018: training starts next to the pretrained function
    training: str = setting("full", choices=("full", "lora"))
    rank: int = setting(8, least=1)
    alpha: float = setting(16.0, above=0)
    after_rounds: int = setting(0, least=0)
    calibration_sequences: int = setting(128, least=1)

    def __post_init__(self) -> None:
        check("graft", self)
        require(1 <= self.experts <= 3, f"graft.experts is {self.experts}; expected 1, 2 or 3")
        for name, allowed, plain in (
            ("experts", (*MERGED_EXPERTS, *NEW_MODULE), 1),
            ("width", ("neurons", *NEW_MODULE), 0),
            ("candidates", ("neurons",), 0),
        ):
            value = getattr(self, name)
            require(
                value == plain or self.criterion in allowed,
                f"graft.{name} is {value}, which the criterion {self.criterion!r} has no use for; "
                f"expected {plain}, or graft.criterion = one of {', '.join(allowed)}",
            )
        require(
            not self.candidates or self.candidates >= self.width,
            f"graft.candidates is {self.candidates}; expected at least the width, {self.width}",
        )
        new = self.criterion in NEW_MODULE
        require(
            not (self.refit and new),
            f"graft.refit is true (its default), but {self.criterion!r} starts from nothing that could be fitted; "
            "expected graft.refit = false",
        )
        require(
            self.gate == "zeros" or not new,
            f"graft.gate is 'router', but {self.criterion!r} grafts no expert whose router row it could take; "
            "expected 'zeros'",
        )

    def of(self, method: Method) -> "GraftSettings":
        """These settings for one method. The paper's rule and the controls have their own criterion and fit nothing,
        but train as `flex` does; their size is that of `flex` as far as it can be (an expert has an expert's width)."""
        criterion = method.start
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
            after_rounds=0 if method.private == "expert" else self.after_rounds,
        )

    def graft_width(self, intermediate_size: int) -> int:
        """I_g on a layer whose experts have this intermediate size."""
        return self.width or self.experts * intermediate_size

    @property
    def fits(self) -> bool:
        """Whether anything is fitted to the calibration data, so that some of them must be kept to check it."""
        return self.refit or self.criterion in ("scaled", "renormalized", "scaled_subset", "neurons")
