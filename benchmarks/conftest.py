"""`--benchmark-only` measures and writes RESULTS.md; `--benchmark-disable` runs everything once, on small shapes.

With `--shape`, `--peer` or `--dtype` (`make bench SHAPE=... PEER=... DTYPE=...`) the layer's rows of what was picked
are printed instead, and RESULTS.md stays as it is.
"""

import itertools
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks import results
from benchmarks.layers import ADDED, PROVIDERS, TRANSFORMERS, maker_of
from benchmarks.shapes import SCORED, SHAPES, SMALL, Shape, parse

DTYPES = (torch.float32, torch.bfloat16)
ROWS = pytest.StashKey[list[results.Row]]()
SCORES = pytest.StashKey[list[results.ScoreRow]]()
PLANS = pytest.StashKey[list[results.PlanRow]]()


@dataclass(frozen=True)
class Picked:
    """What the options say; `anything`: whether they say anything."""

    shapes: tuple[Shape, ...]
    peers: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    anything: bool

    @classmethod
    def of(cls, config: pytest.Config) -> "Picked":
        shape, peer, dtype = (config.getoption(name).strip() for name in ("--shape", "--peer", "--dtype"))
        peers = tuple(dict.fromkeys(filter(None, peer.split(",")))) or (*TRANSFORMERS, *ADDED)
        for name in peers:
            maker_of(name)
        named = {str(known).removeprefix("torch."): known for known in DTYPES}
        if dtype and dtype not in named:
            raise ValueError(f"DTYPE={dtype}: expected {' or '.join(named)}")
        shapes = tuple(map(parse, shape.split()))
        return cls(shapes, peers, (named[dtype],) if dtype else DTYPES, bool(shape or peer or dtype))


PICKED = pytest.StashKey[Picked]()
CAPS = ("FLEX_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("layer bench", "what is measured of the layer; printed, not written")
    group.addoption("--shape", default="", help="T,H,E,K,I or names of benchmarks/shapes.py; spaces between several")
    group.addoption(
        "--peer", default="", help="names (benchmarks/layers.py) or module:callable; commas between several"
    )
    group.addoption("--dtype", default="", help="float32 or bfloat16, both by default")


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[PICKED] = Picked.of(config)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[ROWS], config.stash[SCORES], config.stash[PLANS] = [], [], []


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    named = parent.session.isinitpath(file_path)  # on the command line: pytest collects it by itself
    if file_path.name.startswith("bench_") and file_path.suffix == ".py" and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        small, picked = metafunc.config.getoption("benchmark_disable"), metafunc.config.stash[PICKED]
        usual = SMALL if small else SCORED if "score_rows" in metafunc.fixturenames else SHAPES
        cases = cases_of(picked.shapes or usual, picked.dtypes)
        ids = [f"{shape.name}-{str(dtype).removeprefix('torch.')}" for shape, dtype in cases]
        metafunc.parametrize(("shape", "dtype"), cases, ids=ids, scope="session")

    if "layer_provider" in metafunc.fixturenames:
        metafunc.parametrize("layer_provider", ("flex", *metafunc.config.stash[PICKED].peers))

    if "plan_shape" in metafunc.fixturenames:
        shapes = SMALL if metafunc.config.getoption("benchmark_disable") else SHAPES
        metafunc.parametrize("plan_shape", shapes, ids=[shape.name for shape in shapes])


def cases_of(shapes: Sequence[Shape], dtypes: Sequence[torch.dtype] = DTYPES) -> list[tuple[Shape, torch.dtype]]:
    return list(itertools.product(shapes, dtypes))


@pytest.fixture(scope="session")
def peers(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.config.stash[PICKED].peers


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> list[results.Row]:
    return request.config.stash[ROWS]


@pytest.fixture(scope="session")
def score_rows(request: pytest.FixtureRequest) -> list[results.ScoreRow]:
    return request.config.stash[SCORES]


@pytest.fixture(scope="session")
def plan_rows(request: pytest.FixtureRequest) -> list[results.PlanRow]:
    return request.config.stash[PLANS]


def _command(config: pytest.Config) -> str:
    caps = "".join(f"{name}={os.environ[name]} " for name in CAPS if name in os.environ)
    return caps + "pytest " + shlex.join(config.invocation_params.args)


def _covers(
    rows: Sequence[results.Row | results.ScoreRow], shapes: Sequence[Shape], providers: Sequence[str], *passes: str
) -> bool:
    """Whether every shape was measured in both dtypes of all these providers; others may be there besides."""
    found = {(row.shape, row.dtype, getattr(row, "what", ""), row.provider) for row in rows}
    dtypes = (str(dtype).removeprefix("torch.") for dtype in DTYPES)
    return found >= set(itertools.product(shapes, dtypes, passes or ("",), providers))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Writes the tables of what was measured whole, not a part that `-k` or an option picked."""
    if exitstatus != 0 or session.config.stash[PICKED].anything:
        return
    rows, scores, plans = (session.config.stash[key] for key in (ROWS, SCORES, PLANS))
    command, sections = _command(session.config), {}
    if _covers(rows, SHAPES, (*PROVIDERS, *ADDED), "forward", "training"):
        sections[results.isa()] = results.section(rows, command)
    if _covers(scores, SCORED, ("flex", "products", "published")):
        sections[f"{results.isa()}, scoring"] = results.scoring_section(scores, command)
    if len(plans) == len(SHAPES) * 3:
        sections["routing plan"] = results.plan_section(plans, command)
    if sections:
        results.write(sections)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if config.stash[PICKED].anything and rows:
        terminalreporter.write_line("\n" + results.section(rows, _command(config)))
