"""Who may import whom: csrc <- flex_kernels <- flex <- flex.cli, and importing a floor loads nothing above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOOR = ("flex_kernels.kernels", "flex_kernels.reference", "flex_kernels.layer_inputs")
KERNELS, FLEX = sorted((ROOT / "flex_kernels").rglob("*.py")), sorted((ROOT / "flex").rglob("*.py"))


def imports(path: Path) -> dict[str, bool]:
    """Every module a file names in an import, and whether that stands at the top level (not inside a function)."""
    tree = ast.parse(path.read_text())
    inner = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import; the house writes names out"
            names = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            found[name] = found.get(name, False) or id(node) not in inner
    return found


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_flex_kernels_knows_nothing_above_it(path: Path) -> None:
    assert "flex" not in tops(path)
    assert not tops(path) & {"peft", "flwr", "rich", "matplotlib"}
    assert tops(path) <= {*sys.stdlib_module_names, "torch", "triton", "transformers", "safetensors", "flex_kernels"}
    for name, at_top in imports(path).items():
        if name.partition(".")[0] == "transformers":
            assert path.name in {"transformers_plug.py", "graft_callback.py"}, f"{path.name} imports {name}"
            assert not at_top, f"{path.name} imports {name} before it is asked for"


def test_the_specification_imports_torch_alone() -> None:
    assert tops(ROOT / "flex_kernels" / "reference.py") <= {*sys.stdlib_module_names, "torch"}


def test_kernels_do_not_call_upstairs() -> None:
    for path in (ROOT / "flex_kernels" / "kernels").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("flex_kernels.")}
        assert all(name.startswith(FLOOR) for name in ours), path.name


@pytest.mark.parametrize("path", FLEX, ids=lambda path: path.name)
def test_nobody_imports_the_command_line(path: Path) -> None:
    assert not {name for name in imports(path) if name == "flex.cli" or name.startswith("flex.cli.")}


def test_only_the_operations_say_torch_library() -> None:
    for path in KERNELS:
        says = "torch.library" in path.read_text()
        assert not says or path.parent.name == "ops", f"{path.name} says torch.library"


def test_csrc_knows_no_torch() -> None:
    sources = [path for path in (ROOT / "csrc").iterdir() if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert sources
    for path in sources:
        includes = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
        assert not [line for line in includes if "torch" in line or "ATen" in line or "c10" in line], path.name
        if not path.name.startswith("bindings"):
            assert not [line for line in includes if "pybind11" in line], path.name


def test_setup_is_short_and_needs_no_torch() -> None:
    setup = ROOT / "setup.py"
    assert len(setup.read_text().splitlines()) < 60
    assert tops(setup) <= {*sys.stdlib_module_names, "pybind11", "setuptools"}


def test_importing_flex_kernels_loads_neither_flex_nor_transformers_and_says_nothing() -> None:
    code = (
        "import sys, flex_kernels; "
        "above = {'flex', 'transformers', 'peft', 'flwr', 'triton.compiler'} & set(sys.modules); "
        "assert not above, above; assert set(flex_kernels.__all__) <= set(dir(flex_kernels))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_tables_of_contents_have_no_code() -> None:
    for package in ("flex_kernels", "flex"):
        path = ROOT / package / "__init__.py"
        for node in ast.parse(path.read_text()).body if path.exists() else []:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            names_only = isinstance(node, ast.Assign) and all(
                isinstance(target, ast.Name) and target.id.startswith("__") for target in node.targets
            )
            assert is_docstring or names_only or isinstance(node, ast.Import | ast.ImportFrom), ast.unparse(node)


def test_files_can_be_read_in_one_sitting() -> None:
    for path in (*KERNELS, *FLEX):
        lines = len(path.read_text().splitlines())
        assert lines <= 350, f"{path.relative_to(ROOT)} has {lines} lines"
