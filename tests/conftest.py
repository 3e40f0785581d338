"""Every test starts from the same seed, in poisoned memory: `torch.empty` is NaN until somebody writes it.

With `TRITON_INTERPRET=1` the CPU runs the Triton kernels; `interp_shim` makes their bfloat16 arithmetic right there.
"""

import os
import warnings
from collections.abc import Iterator

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    from interp_shim import install

    install()

import torch
from lost_device import end_if_lost

from flex_kernels import plan
from flex_kernels.backends import pytorch


def pytest_configure(config: pytest.Config) -> None:
    for message in (
        ".*does not have a deterministic implementation.*",  # poisoned memory is what the mode is switched on for
        ".*the native module is not there.*",  # without a compiler the suite tests the torch backend
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if torch.cuda.is_available():
        end_if_lost(report, torch.cuda.synchronize)


@pytest.fixture(autouse=True)
def seeded_in_poisoned_memory() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _backends() -> list[str]:
    with warnings.catch_warnings(action="ignore"):
        chosen = (plan.cuda_backend if torch.cuda.is_available() else plan.cpu_backend)("experts", torch.float32)
    return sorted({"torch", plan.backend_name(chosen)})


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs on the backend that `plan` chooses, and once more on plain torch where that is another one."""
    if request.param == "torch":
        monkeypatch.setattr(plan, "cpu_backend", lambda *_: pytorch)
        monkeypatch.setattr(plan, "cuda_backend", lambda *_: pytorch)
    return request.param
