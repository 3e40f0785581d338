"""A setting of a configuration declares its limits beside its default; this is where they are checked."""

import dataclasses
import math
from typing import Any

from flex.errors import FlexError, require


def setting(
    default: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    zero: str = "",
    distinct: bool = False,
    empty: str = "",
) -> Any:
    """A dataclass field with limits.

    least, above, below: the value is at least, above, below this number.
    choices: of a text, or of each of several texts.
    zero: what 0 stands for, where it has a meaning of its own.
    distinct: no value occurs twice.
    empty: what is expected where the value may not be empty.
    """
    limits = {"least": least, "above": above, "below": below, "choices": choices, "zero": zero}
    return dataclasses.field(default=default, metadata={**limits, "distinct": distinct, "empty": empty})


def check(section: str, settings: Any) -> None:
    """Holds every field of a dataclass against its declared limits.

    Raises:
        FlexError: names the first setting outside them (`section.name`), what came and what is expected.
    """
    for field in dataclasses.fields(settings):
        name = f"{section}.{field.name}" if section else field.name
        value = getattr(settings, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise FlexError(f"{name} is {value}; expected a finite number")
        if field.metadata and value is not None:
            _check_one(name, value, field.metadata)


def _check_one(name: str, value: Any, limits: Any) -> None:
    require(bool(value) or not limits["empty"], f"{name} is empty; expected {limits['empty']}")
    several = isinstance(value, tuple)
    if limits["choices"]:
        wrong = [v for v in (value if several else (value,)) if v not in limits["choices"]]
        named = ", ".join(choice or '""' for choice in limits["choices"])
        expected = f"expected {'some' if several else 'one'} of {named}"
        require(not wrong, f"{name} {f'names {wrong}' if several else f'is {value!r}'}; {expected}")
    if limits["distinct"]:
        twice = [v for index, v in enumerate(value) if v in value[:index]]
        require(not twice, f"{name} names {twice[0] if twice else None!r} twice; expected each once")
    least, above, below = limits["least"], limits["above"], limits["below"]
    if not several and any(limit is not None for limit in (least, above, below)):
        inside = (
            (least is None or value >= least) and (above is None or value > above) and (below is None or value < below)
        )
        require(inside, f"{name} is {value}; expected {_range(least, above, below, limits['zero'])}")


def _range(least: float | None, above: float | None, below: float | None, zero: str) -> str:
    low = f"{least:g}" if least is not None else ""
    if below is not None:
        return f"a number from {low} to below {below:g}" if low else f"a number between {above:g} and {below:g}"
    if above is not None:
        return f"a number above {above:g}"
    return f"{low} ({zero}) or more" if zero else f"{low} or more"
