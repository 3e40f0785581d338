"""What a run is: frozen dataclasses, read from TOML, validated on construction. No `argparse` namespace travels below
`cli.py`; every other file takes one of these."""

import dataclasses
import difflib
import json
import math
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flex.errors import FlexError, require
from flex.methods import METHODS, GraftSettings

TEMPLATES = ("alpaca", "chat")
STRATEGIES = ("fedavg", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam")


@dataclass(frozen=True)
class ModelConfig:
    """The base model: a folder or a hub name that `transformers` can load."""

    path: str = ""
    dtype: str = "auto"  # "auto" keeps the checkpoint's dtype on a GPU and takes float32 on a CPU
    device: str = "auto"
    experts_implementation: str = "flex"

    def __post_init__(self) -> None:
        choices = ("auto", "float32", "bfloat16", "float16")
        require(self.dtype in choices, f"model.dtype is {self.dtype!r}; wanted one of {', '.join(choices)}")


@dataclass(frozen=True)
class DataConfig:
    """Instruction data: JSON lines with `instruction`, `context`, `response` and a column that names the client."""

    train: str = ""
    test: str = ""  # empty: a share of `train` is held out
    test_fraction: float = 0.2
    general: str = ""  # a held-out set that belongs to nobody: what is forgotten shows there
    clients_by: str = "client"
    clients: tuple[str, ...] = ()  # empty: every value of the column
    group_by: str = ""  # a column to report the exact match by, e.g. the skill
    max_train: int = 0  # per client; 0: all
    max_test: int = 0
    template: str = "alpaca"
    max_length: int = 512  # tokens; longer sequences are cut, and the report says how many

    def __post_init__(self) -> None:
        require(self.template in TEMPLATES, f"data.template is {self.template!r}; wanted one of {', '.join(TEMPLATES)}")
        require(
            0 < self.test_fraction < 1, f"data.test_fraction is {self.test_fraction}; wanted a number between 0 and 1"
        )
        require(bool(self.clients_by), "data.clients_by is empty; wanted the column that says whose an example is")
        _require_distinct("data.clients", self.clients)
        require(self.max_length >= 16, f"data.max_length is {self.max_length}; wanted at least 16 tokens")
        for name in ("max_train", "max_test"):
            require(getattr(self, name) >= 0, f"data.{name} is {getattr(self, name)}; wanted 0 (all) or more")

    def for_seed(self, seed: int) -> "DataConfig":
        """The files of one seed: `{seed}` in a path stands for its number (data that is itself drawn from a seed)."""
        files = {name: getattr(self, name).replace("{seed}", str(seed)) for name in ("train", "test", "general")}
        return dataclasses.replace(self, **files)


@dataclass(frozen=True)
class LoraSettings:
    """The only trained thing that leaves a client: LoRA on the attention projections (through `peft`)."""

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"lora.rank is {self.rank}; wanted 1 or more")
        require(self.alpha > 0, f"lora.alpha is {self.alpha}; wanted a number above 0")
        require(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; wanted a number from 0 to below 1")
        require(bool(self.targets), "lora.targets is empty; wanted the names of the attention projections")


@dataclass(frozen=True)
class TrainSettings:
    """The federated run and the local steps. The rate is a cosine over the rounds, constant within one."""

    methods: tuple[str, ...] = ("base", "local", "fedavg", "flex", "flex-paper", "flex-random", "flex-fresh")
    seeds: tuple[int, ...] = (0,)
    strategy: str = "fedavg"
    rounds: int = 100
    steps: int = 5
    batch_size: int = 4
    clients_per_round: int = 0  # 0: all of them
    learning_rate: float = 4e-5
    graft_learning_rate: float = 4e-5
    final_learning_rate: float = 1e-6  # the same share of it for the graft
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    proximal_mu: float = 0.01  # FedProx only
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        unknown = [m for m in self.methods if m not in METHODS]
        require(not unknown, f"train.methods names {unknown}; wanted some of {', '.join(METHODS)}")
        require(bool(self.methods), "train.methods is empty; wanted at least one method")
        require(bool(self.seeds), "train.seeds is empty; wanted at least one seed")
        _require_distinct("train.methods", self.methods)
        _require_distinct("train.seeds", self.seeds)
        require(
            self.strategy in STRATEGIES,
            f"train.strategy is {self.strategy!r}; wanted one of {', '.join(STRATEGIES)}",
        )
        require(
            self.schedule in ("cosine", "constant"),
            f"train.schedule is {self.schedule!r}; wanted 'cosine' or 'constant'",
        )
        for name in ("rounds", "steps", "batch_size"):
            require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; wanted 1 or more")
        for name in ("learning_rate", "graft_learning_rate", "max_grad_norm"):
            require(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}; wanted a number above 0")
        for name in ("final_learning_rate", "weight_decay", "proximal_mu"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; wanted 0 or more")
        require(
            self.clients_per_round >= 0,
            f"train.clients_per_round is {self.clients_per_round}; wanted 0 (all) or more",
        )


@dataclass(frozen=True)
class EvaluateSettings:
    """Scoring on each client's held-out part. Exact match is by teacher forcing, ROUGE-L by greedy decoding."""

    every: int = 0  # rounds; 0: after the last one only
    batch_size: int = 16
    rouge: bool = True
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        require(self.every >= 0, f"evaluate.every is {self.every}; wanted 0 (the last round only) or more")
        for name in ("batch_size", "max_new_tokens"):
            require(getattr(self, name) >= 1, f"evaluate.{name} is {getattr(self, name)}; wanted 1 or more")


@dataclass(frozen=True)
class RunConfig:
    """A whole run: every method and seed named in `train`, on the same data."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    graft: GraftSettings = field(default_factory=GraftSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    output: str = "runs/flex"
    threads: int = 0  # of torch, in each process; 0: torch's own choice
    workers: int = 1  # jobs at once, each in a process of its own with a base of its own

    def __post_init__(self) -> None:
        require(self.threads >= 0, f"threads is {self.threads}; wanted 0 (torch's choice) or more")
        require(self.workers >= 1, f"workers is {self.workers}; wanted 1 or more")
        for section in dataclasses.fields(self):
            values = getattr(self, section.name)
            for key in dataclasses.fields(values) if dataclasses.is_dataclass(values) else ():
                value = getattr(values, key.name)
                finite = not isinstance(value, float) or math.isfinite(value)
                require(finite, f"{section.name}.{key.name} is {value}; wanted a finite number")

    def with_values(self, **sections: dict[str, Any]) -> "RunConfig":
        """A copy with some fields of some sections replaced: `config.with_values(train={"rounds": 3})`."""
        changed = {name: dataclasses.replace(getattr(self, name), **values) for name, values in sections.items()}
        return dataclasses.replace(self, **changed)


def _require_distinct(name: str, values: tuple[Any, ...]) -> None:
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    require(not twice, f"{name} names {twice[0] if twice else None!r} twice; wanted each once")


def _convert(value: Any, wanted: Any, name: str) -> Any:
    """`value` as TOML gives it -> the field's type; numbers may widen, lists become tuples."""
    if typing.get_origin(wanted) is tuple:
        item = typing.get_args(wanted)[0]
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(v, item, name) for v in items)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise FlexError(f"{name} is {value!r}, {_with_article(type(value))}; wanted {_with_article(wanted)}")
    if wanted is str and not _is_unicode(value):
        raise FlexError(f"{name} is {value!r}, with bytes that are no text; wanted UTF-8")
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
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; wanted one of {', '.join(types)}"
            raise FlexError(f"{name} is no setting of a run{hint}")
        if dataclasses.is_dataclass(types[key]):
            require(isinstance(value, dict), f"{name} is {value!r}; wanted a table [{name}]")
            values[key] = _build(types[key], value, f"{name}.")
        else:
            values[key] = _convert(value, types[key], name)
    return cls(**values)


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, sign, raw = text.partition("=")
    require(bool(sign) and bool(key.strip()), f"--set got {text!r}; wanted section.key=value")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw  # a bare word is a string
    return key.strip().split("."), value


def read_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """A run from a TOML file and `section.key=value` overrides (the overrides win).

    Raises:
        FlexError: the file is missing or no TOML, or names a setting that does not exist or has the wrong type.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FlexError(f"no configuration at {path}; wanted a TOML file") from None
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FlexError(f"{path} is not a TOML file: {error}") from None
    for text in overrides:
        (*sections, key), value = _parse_override(text)
        node = table
        for section in sections:
            node = node.setdefault(section, {})
            require(isinstance(node, dict), f"--set {text}: {section} is a value, not a section")
        node[key] = value
    config = _build(RunConfig, table, "")
    require(bool(config.output), "output is empty; wanted the folder of the run")
    return config


def write_config(config: RunConfig, path: Path) -> None:
    """The resolved run as TOML: `read_config` gives the same run back."""
    lines, sections = [], []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            body = [f"{k.name} = {to_toml(getattr(value, k.name))}" for k in dataclasses.fields(value)]
            sections.append("\n".join([f"[{f.name}]", *body]))
        else:
            lines.append(f"{f.name} = {to_toml(value)}")
    path.write_text("\n\n".join(["\n".join(lines), *sections]) + "\n", encoding="utf-8")


def to_toml(value: Any) -> str:
    """JSON spells strings, numbers, booleans and lists as TOML does, but pairs of surrogates are no TOML, and U+007F is
    a control character there."""
    text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")
