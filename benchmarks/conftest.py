"""`--benchmark-only` measures and writes RESULTS.md; `--benchmark-disable` runs everything once, on small shapes."""

import itertools
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import results
from benchmarks.shapes import SCORED, SHAPES, SMALL, Shape

ROWS = pytest.StashKey[list[results.Row]]()
SCORES = pytest.StashKey[list[results.ScoreRow]]()
PLANS = pytest.StashKey[list[results.PlanRow]]()
CAPS = ("FLEX_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[SCORES], config.stash[PLANS] = [], [], []


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    named = parent.session.isinitpath(file_path)  # on the command line: pytest collects it by itself
    if file_path.name.startswith("bench_") and file_path.suffix == ".py" and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        small = metafunc.config.getoption("benchmark_disable")
        cases = cases_of(SMALL if small else SCORED if "score_rows" in metafunc.fixturenames else SHAPES)
        ids = [f"{shape.name}-{str(dtype).removeprefix('torch.')}" for shape, dtype in cases]
        metafunc.parametrize(("shape", "dtype"), cases, ids=ids, scope="session")

    if "plan_shape" in metafunc.fixturenames:
        shapes = SMALL if metafunc.config.getoption("benchmark_disable") else SHAPES
        metafunc.parametrize("plan_shape", shapes, ids=[shape.name for shape in shapes])


def cases_of(shapes: Sequence[Shape]) -> list[tuple[Shape, torch.dtype]]:
    return list(itertools.product(shapes, (torch.float32, torch.bfloat16)))


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> list[results.Row]:
    return request.config.stash[ROWS]


@pytest.fixture(scope="session")
def score_rows(request: pytest.FixtureRequest) -> list[results.ScoreRow]:
    return request.config.stash[SCORES]


@pytest.fixture(scope="session")
def plan_rows(request: pytest.FixtureRequest) -> list[results.PlanRow]:
    return request.config.stash[PLANS]


def _covers(rows: Sequence[results.Row | results.ScoreRow], cases: Sequence[tuple], least: int) -> bool:
    """Whether every case has its rows, of ours and of the usual peers; added peers may be more."""
    counts = Counter((row.shape, row.dtype) for row in rows)
    return all(counts[shape, str(dtype).removeprefix("torch.")] >= least for shape, dtype in cases)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Writes the tables of what was measured whole, not a part that `-k` picked."""
    rows, scores, plans = (session.config.stash[key] for key in (ROWS, SCORES, PLANS))
    caps = "".join(f"{name}={os.environ[name]} " for name in CAPS if name in os.environ)
    command = caps + "pytest " + shlex.join(session.config.invocation_params.args)
    sections = {}
    if _covers(rows, cases_of(SHAPES), 2 * 3):
        sections[results.isa()] = results.section(rows, command)
    if _covers(scores, cases_of(SCORED), 3):
        sections[f"{results.isa()}, scoring"] = results.scoring_section(scores, command)
    if len(plans) == len(SHAPES) * 3:
        sections["routing plan"] = results.plan_section(plans, command)
    if exitstatus == 0 and sections:
        results.write(sections)
