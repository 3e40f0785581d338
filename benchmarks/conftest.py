"""`--benchmark-only` measures and writes RESULTS.md; `--benchmark-disable` runs everything once, on small shapes."""

import os
import shlex
from pathlib import Path

import pytest
import results
from shapes import SHAPES, SMALL

ROWS = pytest.StashKey[list[results.Row]]()
CAPS = ("FLEX_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        shapes = SMALL if metafunc.config.getoption("benchmark_disable") else SHAPES
        metafunc.parametrize("shape", shapes, ids=lambda shape: shape.name, scope="session")


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> list[results.Row]:
    return request.config.stash[ROWS]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Writes the tables when the whole set was measured, not a part that `-k` picked."""
    measured = session.config.stash[ROWS]
    if exitstatus == 0 and measured and len(measured) == len(SHAPES) * 2 * 2 * 3:
        caps = "".join(f"{name}={os.environ[name]} " for name in CAPS if name in os.environ)
        results.write(measured, caps + "pytest " + shlex.join(session.config.invocation_params.args))
