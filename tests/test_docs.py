"""The API page is what the docstrings say, and every docstring says enough."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import flex_kernels

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def make_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_page_is_up_to_date(make_api: ModuleType) -> None:
    assert make_api.PAGE.read_text() == make_api.page(), "python docs/make_api.py writes it anew"


@pytest.mark.parametrize("name", [name for name in flex_kernels.__all__ if name.islower()])
def test_every_function_tells_its_arguments_and_errors(name: str) -> None:
    function = getattr(flex_kernels, name)
    text = inspect.getdoc(function)
    assert text
    if function.__module__.startswith("flex_kernels.ops"):
        assert "Raises:" in text
        assert "twin: `reference." in text.replace("\n", " ").lower()
        for parameter in inspect.signature(function).parameters:
            assert re.search(rf"\b{parameter}\b", text.partition("Args:")[2]), f"{name} does not tell its {parameter}"


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
