"""What a run is: frozen dataclasses, read from TOML, validated on construction. No `argparse` namespace travels below
`cli.py`; every other file takes one of these."""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flex.errors import FlexError, require
from flex.methods import DEFAULT_METHODS, METHODS, GraftSettings
from flex.settings import check, setting

FORMAT = 2  # of config.toml; a file without a number is of format 1 or written by hand, and is read as well
TEMPLATES = ("alpaca", "chat", "auto")  # auto: the tokenizer's chat template where it has one, else alpaca
ANCHORS = ("distill", "gate", "both", "none")
# For `anchor.text` and the files of tasks: every site of a deployment names one of its own.
AT_SITES = "site"
# The server's strategies, and which settings of [strategy] each has a use for.
STRATEGIES: dict[str, tuple[str, ...]] = {
    "fedavg": (),
    "fedprox": ("proximal_mu",),
    "scaffold": (),
    "fedavgm": ("beta_1",),
    "fedadagrad": ("eta", "tau"),
    "fedyogi": ("eta", "tau", "beta_1", "beta_2"),
    "fedadam": ("eta", "tau", "beta_1", "beta_2"),
    "by_tokens": (),
    "flexlora": ("ranks",),
}
PROXIMAL_MU = 0.01  # FedProx's, unless strategy.proximal_mu says another
# How records come to be a client's (`data/splits.py`), and which settings of [data] each way has a use for.
SPLITS: dict[str, tuple[str, ...]] = {
    "column": (),
    "files": (),
    "iid": ("num_clients",),
    "pathological": ("num_clients", "classes_per_client"),
    "dirichlet": ("num_clients", "alpha", "min_size", "replace"),
}
LABELLED = ("pathological", "dirichlet")  # those that go by data.label_by
# What a model is scored on (`evaluation/tasks.py`), and the setting of [evaluate] that a task needs.
TASKS = {"test": "", "general": "", "mmlu": "mmlu", "mmlu_0": "mmlu", "gsm8k": "gsm8k"}
TASKS |= {"perplexity": "text", "cloze": "text"}
# Strategies that go by more than a middle of the clients' values, and those that a bound on an update, or a sum of them
# alone, does not fit: SCAFFOLD has control variates beside the update, the others take the clients' tensors one by one.
ONLY_MEAN = {"by_tokens", "flexlora"}
UNBOUNDED = {"scaffold", "by_tokens"}
NOT_SUMMED = {"scaffold", "by_tokens", "flexlora"}
AGGREGATES = ("mean", "median", "trimmed-mean")
# Settings by the names they had in format 1. There they were always written, whether the strategy used them or not.
OLD_NAMES = {"train.strategy": "strategy.name", "train.proximal_mu": "strategy.proximal_mu"}


# What an example says: the texts of a pair, or the turns of a conversation (`data/records.py`).
TEXTS = ("instruction", "context", "response")
CONVERSATION = "messages"


def check_columns(mapping: Mapping[str, str]) -> None:
    """Raises FlexError where a column mapping names what no record has, or one column for two of ours."""
    known = (*TEXTS, CONVERSATION)
    for ours, theirs in mapping.items():
        if ours not in known:
            hint = f"did you mean {theirs}={ours}?" if theirs in known else f"expected some of {', '.join(known)}"
            raise FlexError(f"data.columns names {ours!r}, which no example has; {hint}")
        require(bool(theirs), f"data.columns.{ours} is empty; expected the name of a column")
    values = list(mapping.values())
    twice = [theirs for index, theirs in enumerate(values) if theirs in values[:index]]
    require(not twice, f"data.columns names the column {twice[0] if twice else ''!r} twice; expected each once")
    both = CONVERSATION in mapping and len(mapping) > 1
    require(not both, "data.columns names messages and texts of a pair; expected messages alone, or no messages")


@dataclass(frozen=True)
class ModelConfig:
    """The base model: a folder or a hub name that `transformers` can load."""

    path: str = ""
    # "auto" keeps the checkpoint's dtype on a GPU and takes float32 on a CPU
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16", "float16"))
    device: str = "auto"
    experts_implementation: str = "flex"
    # "auto" keeps the experts as the checkpoint has them; else a format of flex_kernels/weights.py
    experts: str = setting("auto", choices=("auto", "int8", "nf4"))
    # "auto" leaves a shared expert to its own module; else the fused operation computes it, its weights in that format
    shared_experts: str = setting("auto", choices=("auto", "dense", "int8", "nf4"))

    def __post_init__(self) -> None:
        check("model", self)


@dataclass(frozen=True)
class DataConfig:
    """Instruction data (`data/rows.py`, `data/records.py`): one file with a column that names the client, or a file a
    client."""

    train: str = ""
    test: str = ""  # empty: a share of `train` is held out
    files: dict[str, str] = field(default_factory=dict)  # in place of `train`: the file of each client
    test_files: dict[str, str] = field(default_factory=dict)  # in place of `test`
    columns: dict[str, str] = field(default_factory=dict)  # our names -> the files', e.g. instruction = "question"
    test_fraction: float = setting(0.2, above=0, below=1)
    # What is scored as the test part: "validation", that part of the training records, and no test record is read
    scored: str = setting("test", choices=("test", "validation"))
    # Of each client's training examples: drawn by the run's seed, never trained on, for choices made while training
    validation_fraction: float = setting(0.0, least=0, below=1)
    general: str = ""  # a held-out set that belongs to nobody: what is forgotten shows there
    clients_by: str = setting("client", empty="the column that says whose an example is")
    clients: tuple[str, ...] = setting((), distinct=True)  # empty: every value of the column
    split: str = setting("column", choices=tuple(SPLITS))  # `files` alone says "files"
    label_by: str = ""  # the column of the categories that a split deals out, and that its table shows
    num_clients: int = setting(0, least=0, zero="as many as the column or the files name")  # of a split that is drawn
    classes_per_client: int = setting(2, least=1)
    alpha: float = setting(0.5, above=0)
    min_size: int = setting(1, least=1)  # training records that every client must get
    replace: bool = False  # clients may have records in common
    split_seed: int = 0  # of what is drawn; the same for all seeds of a run, so that they differ in training alone
    group_by: str = ""  # a column to report the exact match by, e.g. the skill
    max_train: int = setting(0, least=0, zero="all")  # per client
    max_test: int = setting(0, least=0, zero="all")
    template: str = setting("alpaca", choices=TEMPLATES)
    max_length: int = setting(512, least=16)  # tokens; longer sequences are cut, and the report says how many

    def __post_init__(self) -> None:
        check("data", self)
        check_columns(self.columns)
        one, many = ("train", "test"), ("files", "test_files")
        for single, several in zip(one, many, strict=True):
            both = bool(getattr(self, single)) and bool(getattr(self, several))
            require(not both, f"data.{single} and data.{several} both name files; expected one of the two")
        require(
            not (self.test and self.files),
            "data.test is one file, but data.files has one for each client; expected data.test_files",
        )
        require(bool(self.files) or not self.test_files, "data.test_files needs data.files; expected both, or neither")
        for name in many:
            for client, path in getattr(self, name).items():
                require(bool(client.strip()), f"data.{name} has a file for {client!r}; expected the name of a client")
                require(bool(path), f"data.{name} has an empty path for {client!r}; expected a file")
        strangers = sorted(self.test_files.keys() - self.files.keys())
        require(not strangers, f"data.test_files names {strangers}, which data.files does not; expected its clients")

        self._check_split()
        require(
            self.scored == "test" or self.validation_fraction > 0,
            'data.scored is "validation", but data.validation_fraction is 0; expected a share of the training records',
        )

    def _check_split(self) -> None:
        if self.split == "files":
            require(bool(self.files), 'data.split is "files", but data.files names none; expected one for each client')
        drawn = bool(SPLITS[self.split])
        require(
            not (self.files and drawn),
            f'data.split is "{self.split}", which deals out one file, but data.files has one for each client; '
            "expected data.train",
        )
        require(
            drawn == bool(self.num_clients),
            f'data.num_clients is {self.num_clients} and data.split "{self.split}"; expected '
            + ("a number of clients to deal the records to" if drawn else "0, or a split that is drawn"),
        )
        require(
            self.split not in LABELLED or bool(self.label_by),
            f'data.label_by is empty, and data.split "{self.split}" goes by it; expected the column of the categories',
        )
        for field_ in dataclasses.fields(self):
            takers = [name for name, keys in SPLITS.items() if field_.name in keys]
            value = getattr(self, field_.name)
            require(
                not takers or self.split in takers or value == field_.default,
                f'data.{field_.name} is {value}, which data.split "{self.split}" has no use for; expected it left out, '
                f"or one of {', '.join(takers)}",
            )

    def with_paths(self, change: Callable[[str], str]) -> "DataConfig":
        """The same with every path of a file changed."""
        single = {name: change(getattr(self, name)) for name in ("train", "test", "general")}
        several = {n: {k: change(v) for k, v in getattr(self, n).items()} for n in ("files", "test_files")}
        return dataclasses.replace(self, **single, **several)

    def for_seed(self, seed: int) -> "DataConfig":
        """The files of one seed: `{seed}` in a path stands for its number (data that is itself drawn from a seed)."""
        return self.with_paths(lambda path: path.replace("{seed}", str(seed)))


@dataclass(frozen=True)
class LoraSettings:
    """The only trained thing that leaves a client: LoRA on the attention projections (through `peft`)."""

    rank: int = setting(32, least=1)
    alpha: float = setting(64.0, above=0)
    dropout: float = setting(0.05, least=0, below=1)
    targets: tuple[str, ...] = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj"), empty="the names of the attention projections"
    )

    def __post_init__(self) -> None:
        check("lora", self)


@dataclass(frozen=True)
class TrainSettings:
    """The federated run and the local steps. The rate is a cosine over the rounds, constant within one."""

    methods: tuple[str, ...] = setting(
        DEFAULT_METHODS, choices=tuple(METHODS), distinct=True, empty="at least one method"
    )
    seeds: tuple[int, ...] = setting((0,), distinct=True, empty="at least one seed")
    rounds: int = setting(100, least=1)
    steps: int = setting(5, least=1)
    batch_size: int = setting(4, least=1)
    accumulate: int = setting(1, least=1)  # batches a step: as one so many times as large, in the memory of one
    clients_per_round: int = setting(0, least=0, zero="all")
    learning_rate: float = setting(4e-5, above=0)
    rates: dict[str, float] = field(default_factory=dict)  # factors on the rates, by method; `--tune` finds them
    tune_factors: tuple[float, ...] = setting((0.3, 1.0, 3.0), distinct=True, empty="the factors that --tune tries")
    # The server's steps that --tune tries with each of them, of strategies that have one
    tune_etas: tuple[float, ...] = setting(
        (1e-3, 1e-2, 1e-1), distinct=True, empty="the server's steps that --tune tries"
    )
    # By which score on the validation parts --tune chooses: the one that methods will be compared by
    tune_by: str = setting("loss", choices=("loss", "exact_match"))
    graft_learning_rate: float = setting(4e-5, above=0)
    final_learning_rate: float = setting(1e-6, least=0)  # the same share of it for the graft
    schedule: str = setting("cosine", choices=("cosine", "constant"))
    weight_decay: float = setting(0.0, least=0)
    max_grad_norm: float = setting(1.0, above=0)
    # The state that is the result: of the last round, or of the one with the lowest loss on the validation parts
    keep: str = setting("last", choices=("last", "best"))
    patience: int = setting(0, least=0, zero="never stops early")  # rounds without a better one
    track: str = setting("", choices=("", "tensorboard"))  # scalars of every round, into the run's folder
    # Of methods that end alone (fedavg-finetune)
    finetune_rounds: int = setting(0, least=0, zero="a tenth of the rounds")
    copy_mu: float = setting(0.1, least=0)  # holds a client's own copy of the LoRA to the shared one (Ditto)
    gradient_checkpointing: bool = False  # a layer's activations are computed again in the backward; same bits
    compile: bool = False  # the model of the local steps by torch.compile: minutes once, then faster steps; other bits
    skip_failed: bool = False  # go on without a client that fails, or whose reply is refused; the log says which
    timeout: float = setting(3600.0, above=0)  # seconds to wait for the replies of clients on other machines

    def __post_init__(self) -> None:
        check("train", self)
        require(
            not self.patience or self.keep == "best",
            f'train.patience is {self.patience}, which train.keep = "last" has no use for; '
            'expected 0, or train.keep = "best"',
        )
        for method, factor in self.rates.items():
            require(method in METHODS, f"train.rates names {method!r}; expected some of {', '.join(METHODS)}")
            require(0 < factor < math.inf, f"train.rates.{method} is {factor}; expected a number above 0")
        for name in ("tune_factors", "tune_etas"):
            low = [number for number in getattr(self, name) if not 0 < number < math.inf]
            require(not low, f"train.{name} names {low}; expected numbers above 0")
        alone = [method for method in self.methods if METHODS[method].last_phases]
        require(
            not alone or self.finetune_rounds <= self.rounds,
            f"train.finetune_rounds is {self.finetune_rounds}; expected at most train.rounds, {self.rounds}",
        )


@dataclass(frozen=True)
class StrategySettings:
    """How the server aggregates what the clients share.

    A setting that is left out (None) is the strategy's own default. A method whose row in `methods.py` names a strategy
    is aggregated by that one instead of `name`. The others hold for every strategy:

    etas: the server's step of single methods, in place of `eta`; `--tune` finds them.
    aggregate: the middle of the clients' values that a strategy goes by (`federation/robust.py`).
    trim: share of the values that "trimmed-mean" takes off at each end.
    max_update_norm: a longer update w_k - w is scaled down to it.
    secure: the server sees the sum of the updates alone (`federation/masking.py`), and not whose is wrong.
    """

    name: str = setting("fedavg", choices=tuple(STRATEGIES))
    eta: float | None = setting(None, above=0)
    tau: float | None = setting(None, above=0)
    beta_1: float | None = setting(None, least=0, below=1)
    beta_2: float | None = setting(None, least=0, below=1)
    etas: dict[str, float] = field(default_factory=dict)
    proximal_mu: float | None = setting(None, least=0)
    ranks: tuple[int, ...] | None = setting(None, empty="the rank of every client, or of the first ones in turn")
    aggregate: str = setting("mean", choices=AGGREGATES)
    trim: float | None = setting(None, above=0, below=0.5)
    max_update_norm: float = setting(0.0, least=0, zero="no bound")
    secure: bool = False

    def __post_init__(self) -> None:
        check("strategy", self)
        for method, eta in self.etas.items():
            require(method in METHODS, f"strategy.etas names {method!r}; expected some of {', '.join(METHODS)}")
            require(0 < eta < math.inf, f"strategy.etas.{method} is {eta}; expected a number above 0")
            require(
                self.has_eta(method),
                f"strategy.etas names {method!r}, which {self.of(method)[0]} averages without a step of the server; "
                f"expected methods of {', '.join(name for name, keys in STRATEGIES.items() if 'eta' in keys)}",
            )
        wrong = [rank for rank in self.ranks or () if rank < 1]
        require(not wrong, f"strategy.ranks names {wrong}; expected 1 or more")
        require(
            self.trim is None or self.aggregate == "trimmed-mean",
            f"strategy.trim is {self.trim}, which strategy.aggregate = {self.aggregate!r} has no use for; "
            "expected it left out, or 'trimmed-mean'",
        )
        require(
            not self.secure or self.aggregate == "mean",
            f"strategy.secure shows the server a sum alone, of which it can take no {self.aggregate}; "
            "expected strategy.aggregate = 'mean'",
        )

    def of(self, method: str) -> tuple[str, dict[str, Any]]:
        """(name, settings that are given and that it takes) of the strategy that averages for `method`."""
        name = METHODS[method].strategy or self.name
        own = {"eta": self.etas[method]} if method in self.etas else {}
        return name, {**self.given(name), **own}

    def has_eta(self, method: str) -> bool:
        """Whether the server takes a step of a size of its own for `method`."""
        return METHODS[method].averages and "eta" in STRATEGIES[self.of(method)[0]]

    def mu(self, method: str) -> float:
        """FedProx's mu of a client's steps for `method`; 0 where another strategy averages."""
        name, given = self.of(method)
        return given.get("proximal_mu", PROXIMAL_MU) if "proximal_mu" in STRATEGIES[name] else 0.0

    def given(self, name: str) -> dict[str, Any]:
        """The settings that are given, of those that this strategy takes."""
        values = {key: getattr(self, key) for key in STRATEGIES[name]}
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class AnchorSettings:
    """General text that belongs to nobody: a term beside a client's own loss holds its model to the base there.

    A setting that is left out (None) takes its default where there is a `text`; without a text there is no anchor.

    text: plain text, or records of instructions or conversations as in `data.train`, or of `text`; `.gz` is unpacked;
        `{seed}` stands for the seed's number. It is cut to `data.max_length` tokens an example. At several sites each
        names its own file; "site" stands for it in the configuration that they get.
    what: "distill" (the default): KL(base || model), nats a token; of an instruction at its response alone. "gate": how
        far the grafts' gates stand open on the anchors' tokens, mean over tokens and layers; it trains the gates
        alone, and wants a graft. "both": their sum; a method without a graft gets the first alone. "none".
    weight: of the term; left out 0.1. The gate's counts `gate_factor` times as much.
    batch_size: anchors a step; left out: a quarter of `train.batch_size`.
    examples: how many are kept, evenly over the file; left out 256.
    top_k: of the base's answer at a token its likeliest `top_k` tokens are kept, and all others as one.
    """

    text: str = ""
    what: str | None = setting(None, choices=ANCHORS)
    weight: float | None = setting(None, least=0)
    batch_size: int | None = setting(None, least=1)
    examples: int | None = setting(None, least=1)
    top_k: int | None = setting(None, least=1)
    gate_factor: float | None = setting(None, above=0)

    def __post_init__(self) -> None:
        check("anchor", self)
        if self.what != "none" and not self.text:
            given = [f.name for f in dataclasses.fields(self) if f.name != "text" and getattr(self, f.name) is not None]
            name = given[0] if given else ""
            require(
                not given,
                f"anchor.{name} is {getattr(self, name or 'text')!r}, but anchor.text is empty; expected a file of "
                'general text, or anchor.what = "none"',
            )

    def resolved(self, batch_size: int) -> "AnchorSettings | None":
        """Every setting with its value, beside a training batch of this size; None where there is no anchor."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is not None}
        defaults = {"what": "distill", "weight": 0.1, "batch_size": max(1, batch_size // 4), "examples": 256}
        full = {**defaults, "top_k": 64, "gate_factor": 10.0, **values}
        return AnchorSettings(**full) if self.text and full["what"] != "none" and full["weight"] > 0 else None


@dataclass(frozen=True)
class EvaluateSettings:
    """Scoring on each client's held-out part. Exact match is by teacher forcing, ROUGE-L by greedy decoding."""

    every: int = setting(0, least=0, zero="the last round only")  # rounds
    batch_size: int = setting(16, least=1)
    clients: int = setting(0, least=0, zero="all")  # how many are evaluated, the same ones every time
    rouge: bool = True
    max_new_tokens: int = setting(256, least=1)
    tasks: tuple[str, ...] = setting(
        ("test", "general"), choices=tuple(TASKS), distinct=True, empty="at least the test part"
    )
    mmlu: str = ""  # a folder with dev/<subject>_dev.csv and test/<subject>_test.csv
    gsm8k: str = ""  # a file of questions and answers
    text: str = ""  # a text file, for perplexity and cloze
    questions: int = setting(0, least=0, zero="all")  # of each subject, of gsm8k, and of cloze
    prompt_length: int = setting(2048, least=16)  # tokens of a prompt with examples; never more than the model takes

    def __post_init__(self) -> None:
        check("evaluate", self)
        require("test" in self.tasks, f"evaluate.tasks is {', '.join(self.tasks)}; expected test among them")
        for task in self.tasks:
            need = TASKS[task]
            require(
                not need or bool(getattr(self, need)),
                f"evaluate.tasks names {task}, but evaluate.{need} is empty; expected its path",
            )


@dataclass(frozen=True)
class RunConfig:
    """A whole run: every method and seed named in `train`, on the same data."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    graft: GraftSettings = field(default_factory=GraftSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    strategy: StrategySettings = field(default_factory=StrategySettings)
    anchor: AnchorSettings = field(default_factory=AnchorSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    output: str = "runs/flex"
    threads: int = setting(0, least=0, zero="torch's choice")  # of torch, in each process
    workers: int = setting(1, least=1)  # jobs at once, each in a process of its own with a base of its own

    def __post_init__(self) -> None:
        check("", self)
        require(
            self.train.keep == "last" or self.data.validation_fraction > 0,
            'train.keep is "best", which is chosen on a validation part of the training data; expected '
            "data.validation_fraction above 0, e.g. 0.1",
        )
        names = {self.strategy.of(method)[0] for method in self.train.methods}
        for given, setting_name, unfit in (
            (self.strategy.secure, "secure", NOT_SUMMED),
            (self.strategy.max_update_norm, "max_update_norm", UNBOUNDED),
            (self.strategy.aggregate != "mean", "aggregate", ONLY_MEAN),
        ):
            require(
                not given or not names & unfit,
                f"strategy.{setting_name} is {getattr(self.strategy, setting_name)!r}, which does not hold for what "
                f"the clients of {', '.join(sorted(names & unfit))} send; expected it left out, or another strategy",
            )
        for key in {key for keys in STRATEGIES.values() for key in keys}:
            value, users = getattr(self.strategy, key), [name for name, keys in STRATEGIES.items() if key in keys]
            require(
                value is None or bool(names & set(users)),
                f"strategy.{key} is {value}, which {', '.join(sorted(names))} has no use for; "
                f"expected it left out, or one of {', '.join(users)}",
            )
        high = max(self.strategy.ranks or (0,))
        require(
            high <= self.lora.rank,
            f"strategy.ranks names {high}; expected at most lora.rank, {self.lora.rank}, which the server keeps",
        )
        if anchor := self.anchors:
            bare = [m for m in self.train.methods if METHODS[m].trains and METHODS[m].private != "graft"]
            require(
                anchor.what != "gate" or not bare,
                f"anchor.what is 'gate', but {', '.join(bare)} has no graft whose gate could be held; expected "
                "methods with a graft alone, or one of distill, both, none",
            )
            require(
                anchor.batch_size <= anchor.examples,
                f"anchor.batch_size is {anchor.batch_size}; expected at most anchor.examples, {anchor.examples}",
            )

    @property
    def anchors(self) -> AnchorSettings | None:
        """The anchor of this run, every setting with its value; None where it has none."""
        return self.anchor.resolved(self.train.batch_size)

    def scores_after(self, round_index: int) -> bool:
        """Whether a round of training ends with an evaluation: every `evaluate.every` rounds, and the last."""
        every = self.evaluate.every
        return round_index == self.train.rounds or (every > 0 and round_index % every == 0)

    def may_keep(self, round_index: int) -> bool:
        """Whether the state after a round may be the job's result: the last one's, or any that may be the best."""
        return round_index >= self.train.rounds or self.train.keep == "best"

    def with_values(self, **sections: dict[str, Any]) -> "RunConfig":
        """A copy with some fields of some sections replaced: `config.with_values(train={"rounds": 3})`."""
        changed = {name: dataclasses.replace(getattr(self, name), **values) for name, values in sections.items()}
        return dataclasses.replace(self, **changed)


def _convert(value: Any, kind: Any, name: str) -> Any:
    """`value` as TOML gives it -> the field's type; numbers may widen, lists become tuples."""
    if typing.get_origin(kind) is types.UnionType:  # `X | None`: left out, or an X
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(v, item, name) for v in items)
    if typing.get_origin(kind) is dict:
        require(isinstance(value, dict), f'{name} is {value!r}; expected a table, e.g. {name} = {{a = "..."}}')
        item = typing.get_args(kind)[1]
        return {_convert(k, str, name): _convert(v, item, f"{name}.{k}") for k, v in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise FlexError(f"{name} is {value!r}, {_with_article(type(value))}; expected {_with_article(kind)}")
    if kind is str and not _is_unicode(value):
        raise FlexError(f"{name} is {value!r}, with bytes that are no text; expected UTF-8")
    return value


def _with_article(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"


def _is_unicode(text: str) -> bool:
    """False where the command line gave bytes that are no UTF-8: Python keeps them as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _build(cls: type, table: dict[str, Any], prefix: str) -> Any:
    types = typing.get_type_hints(cls)
    values = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; expected one of {', '.join(types)}"
            raise FlexError(f"{name} is no setting of a run{hint}")
        if dataclasses.is_dataclass(types[key]):
            require(isinstance(value, dict), f"{name} is {value!r}; expected a table [{name}]")
            values[key] = _build(types[key], value, f"{name}.")
        else:
            values[key] = _convert(value, types[key], name)
    return cls(**values)


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, sign, raw = text.partition("=")
    require(bool(sign) and bool(key.strip()), f"--set got {text!r}; expected section.key=value")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw  # a bare word is a string
    key = key.strip()
    return OLD_NAMES.get(key, key).split("."), value


def _rename(table: dict[str, Any], where: str) -> None:
    """Gives the settings of a file the names they have today, and takes its format number out.

    Raises:
        FlexError: a later format, or a setting under both of its names.
    """
    number = table.pop("format", FORMAT)
    require(
        type(number) is int and 1 <= number <= FORMAT,
        f"{where} has format {number!r}; this version reads formats 1 to {FORMAT}",
    )
    for old, new in OLD_NAMES.items():
        (old_section, old_key), (section, key) = old.split("."), new.split(".")
        source = table.get(old_section)
        if isinstance(source, dict) and old_key in source:
            target = table.setdefault(section, {})
            both = isinstance(target, dict) and key in target
            require(not both, f"{where} names both {old} and {new}; expected {new} alone")
            target[key] = source.pop(old_key)


def _without_unused(table: dict[str, Any]) -> None:
    """Format 1 wrote FedProx's mu into every file: where no strategy of the run takes it, it says nothing."""
    strategy, train = (table.get(section, {}) for section in ("strategy", "train"))
    methods = [METHODS[m] for m in train.get("methods", DEFAULT_METHODS) if m in METHODS]
    names = {strategy.get("name", "fedavg"), *(method.strategy for method in methods)}
    if not any("proximal_mu" in STRATEGIES.get(name, ()) for name in names):
        _build(StrategySettings, strategy, "strategy.")  # a wrong value is refused all the same
        strategy.pop("proximal_mu", None)


def read_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """A run from a TOML file and `section.key=value` overrides (the overrides win).

    Raises:
        FlexError: the file is missing or no TOML, or names a setting that does not exist or has the wrong type.
    """
    text = ""
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise FlexError(f"no configuration at {path}; expected a TOML file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise FlexError(f"{path} is not a TOML file: {error}") from None
    return parse_config(text, overrides, str(path))


def parse_config(text: str, overrides: Sequence[str] = (), where: str = "the configuration") -> RunConfig:
    """A run from the text of a TOML file, which errors call `where`; otherwise as `read_config`.

    Raises:
        FlexError: the text is no TOML, or names a setting that does not exist or has the wrong type.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FlexError(f"{where} is not a TOML file: {error}") from None
    old_mu = isinstance(table.get("train"), dict) and "proximal_mu" in table["train"]
    _rename(table, where)
    for override in overrides:
        (*sections, key), value = _parse_override(override)
        node = table
        for section in sections:
            node = node.setdefault(section, {})
            require(isinstance(node, dict), f"--set {override}: {section} is a value, not a section")
        node[key] = value
    if old_mu:
        _without_unused(table)
    config = _build(RunConfig, table, "")
    require(bool(config.output), "output is empty; expected the folder of the run")
    return config


def write_config(config: RunConfig, path: Path) -> None:
    """The resolved run as a TOML file: `read_config` gives the same run back."""
    path.write_text(config_text(config), encoding="utf-8")


def config_text(config: RunConfig) -> str:
    """The resolved run as TOML: `parse_config` gives the same run back."""
    lines, sections = [f"format = {FORMAT}"], []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            given = {k.name: getattr(value, k.name) for k in dataclasses.fields(value)}
            body = [f"{name} = {to_toml(own)}" for name, own in given.items() if own is not None]
            sections.append("\n".join([f"[{f.name}]", *body]))
        else:
            lines.append(f"{f.name} = {to_toml(value)}")
    return "\n\n".join(["\n".join(lines), *sections]) + "\n"


def to_toml(value: Any) -> str:
    """JSON spells strings, numbers, booleans and lists as TOML does, but pairs of surrogates are no TOML, and U+007F is
    a control character there."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_toml(key)} = {to_toml(own)}" for key, own in value.items()) + "}"
    text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")
