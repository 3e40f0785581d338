"""The house: who may import whom, from one table of floors; and what is declared once and read everywhere else."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from flex.config import STRATEGIES, RunConfig
from flex.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
# From the ground up. A room (or a single file) imports what is below it and its own files, nothing beside it.
FLOORS = (
    ("flex_kernels.reference",),
    ("flex_kernels.weights", "flex_kernels.described"),
    ("flex_kernels.backends",),
    ("flex_kernels.tuning",),
    ("flex_kernels.plan",),
    ("flex_kernels.ops",),
    ("flex_kernels.selection", "flex_kernels.layer"),
    ("flex_kernels.graft_watch", "flex_kernels.fused_router"),
    ("flex_kernels.transformers_plug",),
    ("flex_kernels.grafts", "flex_kernels.prepare", "flex_kernels.checkpoints"),
    ("flex_kernels.graft_files", "flex_kernels.weight_files"),
    ("flex_kernels.graft_callback",),
    ("flex_kernels",),
    ("flex.errors",),
    ("flex.settings",),
    ("flex.methods", "flex.store"),
    ("flex.config",),
    ("flex.data", "flex.demo"),
    ("flex.evaluation",),
    ("flex.report",),
    ("flex.model",),
    ("flex.graft",),
    ("flex.federation",),
    ("flex.runs",),
    ("flex.deploy",),
    ("flex.commands",),
    ("flex.cli",),
)
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
            lazy = {"transformers_plug.py", "graft_callback.py", "weight_files.py"}
            assert path.name in lazy, f"{path.name} imports {name}"
            assert not at_top, f"{path.name} imports {name} before it is asked for"


def test_the_specification_imports_torch_alone() -> None:
    assert tops(ROOT / "flex_kernels" / "reference.py") <= {*sys.stdlib_module_names, "torch"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in (*KERNELS, *FLEX)}


def arrows(name: str) -> set[str]:
    """The modules of the house that a module imports, lazily or not; a name from a module counts as that module."""
    found = set()
    for full in imports(MODULES[name]):
        found |= {full} if full in MODULES else set()
    return found - {name}


def floor_of(name: str) -> int:
    """The index in FLOORS of the longest entry that is this module or a room above it."""
    entries = [(entry, index) for index, floor in enumerate(FLOORS) for entry in floor]
    found = [(len(entry), index) for entry, index in entries if name == entry or name.startswith(f"{entry}.")]
    assert found, f"{name} stands on no floor: add it, or its room, to FLOORS"
    return max(found)[1]


def room_of(name: str) -> str:
    return max((entry for floor in FLOORS for entry in floor if name == entry or name.startswith(f"{entry}.")), key=len)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("flex", "flex_kernels")])
def test_a_room_imports_only_what_is_below(name: str) -> None:
    for other in arrows(name) - {"flex", "flex_kernels"}:
        if room_of(other) != room_of(name):
            assert floor_of(other) < floor_of(name), f"{name} imports {other}, which is not below it"


def test_there_is_no_circle_of_imports() -> None:
    """Lazy imports count. A package that only re-exports is no member of a circle."""
    inner = {name for name, path in MODULES.items() if path.name != "__init__.py"}
    graph = {name: arrows(name) & inner for name in inner}
    while graph:
        leaves = {name for name, targets in graph.items() if not targets & graph.keys()}
        assert leaves, f"these import each other in a circle: {sorted(graph)}"
        graph = {name: targets for name, targets in graph.items() if name not in leaves}


def test_rooms_are_two_levels_and_say_what_they_are_for() -> None:
    assert len([path for path in FLEX if path.parent == ROOT / "flex"]) <= 8
    for name, path in MODULES.items():
        assert name.count(".") <= (3 if name.startswith("flex_kernels.backends.triton") else 2), name
        if path.name == "__init__.py" and name != "flex":
            assert ast.get_docstring(ast.parse(path.read_text())), f"{name} does not say what it is for"


@pytest.mark.parametrize("path", [path for path in FLEX if path.name != "methods.py"], ids=module_of)
def test_nobody_asks_for_a_method_by_its_name(path: Path) -> None:
    """The table of methods says what a method does; a name in a comparison or as a key would be a second table."""
    for node in ast.walk(ast.parse(path.read_text())):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            asked = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            asked = node.args[:1]
        names = [leaf.value for part in asked for leaf in ast.walk(part) if isinstance(leaf, ast.Constant)]
        assert not set(names) & set(METHODS), f"{path.name}, line {node.lineno}: {ast.unparse(node)}"


# By which names the code has a section at hand.
SECTIONS = {
    "model": ("model", "config"),
    "data": ("data", "config"),
    "lora": ("lora",),
    "graft": ("graft", "settings", "self"),
    "train": ("train",),
    "strategy": ("strategy", "self"),
    "evaluate": ("evaluate", "settings"),
    "": ("config",),
}


@pytest.mark.parametrize(
    ("section", "name"),
    [(s, f.name) for s in SECTIONS for f in dataclasses.fields(getattr(RunConfig(), s) if s else RunConfig())],
)
def test_every_setting_is_read(section: str, name: str) -> None:
    """A setting that is accepted, checked and written, and that no code reads, would do nothing and say nothing."""
    if section == "strategy" and any(name in takes for takes in STRATEGIES.values()):
        return
    declared = {"settings.py"} if section in ("graft", "strategy") else {"settings.py", "config.py", "methods.py"}
    readers = []
    for path in FLEX:
        if path.name in declared and path.parent.name == "flex":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == name:
                owner = node.value
                last = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                readers += [path] if last in SECTIONS[section] else []
    assert readers, f"nobody reads {section}.{name}"


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
