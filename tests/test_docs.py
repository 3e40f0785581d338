"""The API page is what the docstrings say, every docstring says enough, and what the documents tell to type works.

Each command of the documents is one of three: a `flex` command, which is run here on a tiny model and data, its
placeholders replaced; one that another test runs (`TESTED`); one that stands in NOTES.md with its minutes. Any other
fails.
"""

import ast
import csv
import importlib.util
import inspect
import io
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny import records, save_model, write_records
from transformers import AutoModelForCausalLM

import flex_kernels
from flex.cli import main

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


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = r"(?:[A-Z_]+=[^\s`]+ )*(?:flex|make|python3?|pytest|pip|flwr|flower-\w+|bash|docker|apt-get) "
# Commands by their beginning -> the test that runs the same.
TESTED = {
    "flex deploy": "tests/flower/page.py::test_the_commands_of_the_page",
    "flex worker": "tests/flower/page.py::test_the_commands_of_the_page",
    "flex node": "tests/flower/engines.py::test_deployment_through_accidents_gives_the_bits_of_one_machine",
    "flex report --run fed/run": "tests/flower/page.py::test_the_commands_of_the_page",
    "flwr run": "tests/flower/engines.py::test_flowers_simulation_gives_the_bits_of_one_machine",
    "make test-flower": "tests/flower/engines.py",
    "make test-flower-all": "tests/flower/faults.py",
    "make full-size": "tests/tools/test_full_size.py",
    "python docs/make_api.py": "tests/test_docs.py::test_the_api_page_is_up_to_date",
    "python examples/serve.py": "tests/test_examples.py::test_serve",
    "python -m tools.pretrain": "tests/tools/test_pretrain.py",
    "python -m benchmarks.knowledge page": "tests/benchmarks/test_knowledge.py::test_the_page_is_made",
    "python -m benchmarks.study page": "tests/benchmarks/test_study.py::test_the_page_says_what_the_jobs_measured",
    "PYTHONPATH=. make bench SHAPE=": "tests/benchmarks/test_bench_picked.py::test_make_hands_on_what_was_picked",
}
SMALL = (  # configurations of the documents train for hours
    "train.methods=['fedavg','flex']",
    "train.rounds=1",
    "train.steps=1",
    "train.batch_size=2",
    "lora.rank=2",
    "data.max_length=64",
    "evaluate.max_new_tokens=2",
    "graft.calibration_sequences=4",
)
QUESTION = "which is larger , 3 or 5 ?"
CATEGORIES = ("closed_qa", "information_extraction", "classification", "summarization")


def commands_of(document: Path) -> list[str]:
    """In fences without a language or with a shell's, indented, or within a line; each once, without its comment."""
    text = re.sub(r"\\\n\s*", "", document.read_text())
    text = re.sub(r"^```(?!sh|bash|console)\w+\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(rf"^(?: {{4}})?({PROGRAMS}.*)$", text, flags=re.MULTILINE)
    found = [re.sub(r"\s+#\s.*", "", line) for line in lines if not line.startswith("flex seed ")]  # what it prints
    within = re.findall(rf"`({PROGRAMS}[^`]*)`", text)  # `flex train` or `flex eval --test` is a name, not a command
    found += [command for command in within if not re.fullmatch(r"flex \w+(?: --[\w-]+)*|.*\.\.\..*", command)]
    return list(dict.fromkeys(re.sub(r"\s+", " ", command).strip() for command in found))


def by_hand() -> dict[str, str]:
    """Command -> minutes, of the table of NOTES.md."""
    part = (ROOT / "NOTES.md").read_text().partition("\n## Commands that take longer\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", part, flags=re.MULTILINE))


def settled(command: str, known: dict[str, str]) -> str | None:
    """What is known of a command: that of its longest beginning."""
    fitting = [begin for begin in known if command == begin or (command + " ").startswith((begin + " ", begin + "="))]
    fitting += [begin for begin in known if begin.endswith("=") and command.startswith(begin)]
    return known[max(fitting, key=len)] if fitting else None


def of_flex(document: Path) -> list[str]:
    return [c for c in commands_of(document) if c.startswith("flex ") and not settled(c, TESTED | by_hand())]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_is_run_by_a_test_or_named_with_its_minutes(document: Path) -> None:
    known = TESTED | by_hand()
    unknown = [c for c in commands_of(document) if not c.startswith("flex ") and not settled(c, known)]
    assert unknown == [], "expected in TESTED or in NOTES.md, Commands that take longer"


def test_what_is_said_of_commands_is_so() -> None:
    hand, everywhere = by_hand(), [command for document in DOCUMENTS for command in commands_of(document)]
    assert len(everywhere) > 12
    for command, minutes in hand.items():
        assert re.match(r"[\d.]+", minutes), f"{command}: no minutes"
    for beginning in TESTED | hand:
        assert any(settled(command, {beginning: "x"}) for command in everywhere), f"{beginning}: in no document"
    for where in TESTED.values():
        file, _, test = where.partition("::")
        assert re.search(rf"^def {test or 'test_'}", (ROOT / file).read_text(), flags=re.MULTILINE), where


def test_make_quick_enters_every_room() -> None:
    """By what its test files import; `csrc` is what `flex_kernels.backends.native` calls."""
    files = {line.partition("::")[0] for line in (ROOT / "tests" / "quick.txt").read_text().split()}
    entered = {name for file in files for name in imported(ROOT / file)}
    rooms = [path.parent for place in ("flex", "flex_kernels") for path in (ROOT / place).glob("*/__init__.py")]
    for room in (*rooms, ROOT / "tools" / "pretrain", ROOT / "benchmarks", ROOT / "flex_kernels" / "tuning"):
        name = ".".join(room.relative_to(ROOT).parts)
        door = "flex_kernels" if name == "flex_kernels.ops" else name  # what the package itself gives
        assert any(f"{other}.".startswith(f"{door}.") for other in entered), f"{name}: no test of it in quick.txt"
    assert "tests/test_examples.py" in files


def imported(path: Path) -> set[str]:
    """Every module that a file imports, and every name out of one."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def world(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader has it: the configurations, a model, data files of four clients."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "model").symlink_to(small_model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


STANDS_FOR = {
    "Qwen/Qwen1.5-MoE-A2.7B": "model",
    "BASE": "model",
    "MODEL": "model",
    "RUN": "runs/paper",
    "NAME": CATEGORIES[0],
}
STANDS_FOR |= {"CONFIG": "configs/paper.toml --model model --data train.jsonl --test test.jsonl"}
DOTS = {"--model": "model", "--data": "train.jsonl", "--prompt": QUESTION}


def write_data(path: Path, words: list[str]) -> None:
    """A file that a command names: rows of four clients in the columns of its options, or one question as text."""
    if path.suffix == ".txt":
        path.write_text(f"{QUESTION}\n")
        return
    after = {option: words[at + 1 :] for at, option in enumerate(words) if option.startswith("--")}
    owner = after.get("--clients-by", ["category"])[0]
    theirs = dict(word.split("=") for word in after.get("--columns", ()) if "=" in word)
    rows = []
    for row in records("a", *((8, 30) if re.search("test|mine|questions", path.name) else (30, 0))):
        told = {name: row[name] for name in ("instruction", "context", "response")}
        if "messages" in theirs:
            turns = [("user", row["instruction"]), ("assistant", row["response"])]
            told = {"messages": [{"role": role, "content": content} for role, content in turns]}
        told = {theirs.get(name, name): value for name, value in told.items()}
        rows += [told | {"category": category, owner: category} for category in CATEGORIES]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_records(path, rows)


def typed_by_a_reader(command: str, world: Path) -> tuple[list[str], str]:
    """The words of a command, its placeholders replaced, and what it is given on standard input.

    The files that it names are there then, with data of the tiny model's kind.
    """
    for placeholder, stands_for in STANDS_FOR.items():
        command = re.sub(rf"(?<![\w./-]){re.escape(placeholder)}(?![\w./-])", stands_for, command)
    command = re.sub(r" > \S+", "", re.sub(r"\[(--[^]]*)\]", r"\1", command))  # [--option] may be left out
    command, _, stdin = command.partition(" < ")
    words = shlex.split(command)[1:]
    words = [DOTS[words[at - 1]] if word == "..." else word for at, word in enumerate(words)]
    for name in re.findall(r"[\w./-]+\.(?:jsonl|csv|txt)", f"{command} {stdin}"):
        write_data(world / name, words)
    for word in words:
        if re.fullmatch(r"runs/[ab]", word):
            shutil.copytree(world / "runs" / "paper", world / word)
    if "evaluate.mmlu=MMLU" in words:
        for part in ("dev", "test"):
            (world / "MMLU" / part).mkdir(parents=True)
            (world / "MMLU" / part / f"art_{part}.csv").write_text(f'"{QUESTION}",3,5,7,9,B\n' * 2)
    if "--run" in words and not (world / "runs").exists():  # of a document that trains none
        assert main(typed_by_a_reader("flex train CONFIG", world)[0]) == 0
    if words[0] in ("train", "graft"):
        words += [word for setting in SMALL for word in ("--set", setting)]
    if words[0] == "train" and "--dry-run" not in words:  # each begins a run of its own
        shutil.rmtree(world / "runs", ignore_errors=True)
    return words, (world / stdin).read_text() if stdin else f"{QUESTION}\n"


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if of_flex(path)], ids=lambda path: path.name)
def test_flex_commands_of_a_document_run_one_after_another(
    document: Path, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in of_flex(document):
        words, stdin = typed_by_a_reader(command, world)
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        assert main(words) == 0, f"{command}\n{capsys.readouterr().err}"


PYTHON = [
    pytest.param(code, id=f"{path.name}-{at}")
    for path in DOCUMENTS
    if path.name != "api.md"
    for at, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL))
]


@pytest.mark.parametrize("code", PYTHON)
@pytest.mark.usefixtures("world")
def test_python_of_a_document_runs(code: str) -> None:
    names = {"__name__": "document"}
    if not re.search(r"^model = .*", code.partition("model)")[0], flags=re.MULTILINE):  # what a reader has loaded
        names["model"] = AutoModelForCausalLM.from_pretrained("model")
    exec(compile(code.replace("Qwen/Qwen1.5-MoE-A2.7B", "model"), "document", "exec"), names)


def test_a_command_is_found_however_it_is_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```\nmake demo   # why\nA=1 make bench \\\n    SHAPE=x\n```\n\n    python -m it  # so\n\n`flex train` names, "
        "`pip install it` tells.\n\n```python\nmake = 1\n```\n"
    )
    assert commands_of(page) == ["make demo", "A=1 make bench SHAPE=x", "python -m it", "pip install it"]
    known = {"make bench": "1", "make bench SHAPE=": "2", "make": "3"}
    assert settled("make bench SHAPE=4 PEER=x", known) == "2"
    assert settled("make benchmarks", {"make bench": "1"}) is None


def test_every_make_target_of_a_document_is_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    typed = {word for path in DOCUMENTS for c in commands_of(path) for word in re.findall(r"\bmake ([a-z][\w-]*)", c)}
    assert {"demo", "test", "quick", "bench"} <= typed
    assert typed <= targets, f"no target of the Makefile: {typed - targets}"
