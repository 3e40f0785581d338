"""What a run asks of its data and its base, looked at before any method trains.

Methods come one after another, hours apart: what the last one lacks is said before the first begins.
"""

from flex.config import RunConfig
from flex.data.clients import read_clients, read_general
from flex.errors import require
from flex.federation.strategy import configured_strategy
from flex.graft.choose import check as check_grafts
from flex.methods import METHODS
from flex.model.adapters import recomputed, unwrap, wrap
from flex.model.attention import targets_of
from flex.model.compiled import check_compiler
from flex.runs.world import World


def pinned(config: RunConfig, world: World) -> RunConfig:
    """The configuration with what "auto" stands for on this base, so that a run's own file says it.

    Raises:
        FlexError: `lora.targets` are not in this base.
    """
    if any(METHODS[method].lora for method in config.train.methods):
        config = config.with_values(lora={"targets": targets_of(world.base.model, config.lora)})
    return config.with_values(data={"template": world.encoder.template})


def check_data(config: RunConfig) -> None:
    """Every seed's data where each has its own: that of a later seed is read hours after the start.

    Raises:
        FlexError: see `read_clients`; `graft.after_rounds` leaves no round for the graft.
    """
    grafts = [method for method in config.train.methods if METHODS[method].private == "graft"]
    after, rounds = config.graft.after_rounds, config.train.rounds
    require(
        not grafts or after < rounds,
        f"graft.after_rounds is {after}, so that {', '.join(grafts)} would train no graft in {rounds} rounds; expected "
        "fewer, or more train.rounds",
    )
    first = config.data.for_seed(config.train.seeds[0])
    for seed in config.train.seeds[1:]:
        data = config.data.for_seed(seed)
        if data != first:
            read_clients(data, seed=seed)
            read_general(data)


def check_methods(config: RunConfig, world: World) -> None:
    """Every method is put on the base once, as its jobs will do it, and taken off again.

    Raises:
        FlexError: a strategy, a LoRA, a graft or the recomputing of activations that this base or these clients cannot
            have; torch.compile is asked for and cannot compile here.
    """
    with recomputed(world.base.model, config.train.gradient_checkpointing):
        pass
    if config.train.compile:
        check_compiler(str(world.base.device))
    seen = set()
    for name in config.train.methods:
        method = METHODS[name]
        configured_strategy(config, name, len(world.clients))
        if method.start is not None:
            check_grafts(world.base, config.graft.of(method))
        if (method.lora, method.private, method.start) not in seen:
            seen.add((method.lora, method.private, method.start))
            wrap(world.base, method, config.lora, config.graft, config.train.seeds[0])
    unwrap(world.base)
