"""Every example runs and does what its first line says. In this process, but for the one that wants two of them."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console
from tiny import tiny_config

from flex.cli import main
from flex.commands.saved import load_saved
from flex.runs.run import run

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# peft 0.21 asks transformers 5.23 for a name that is deprecated there; inductor imports what torch deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example that the test is named after: test_trainer -> examples/trainer.py."""
    monkeypatch.syspath_prepend(EXAMPLES)
    name = request.function.__name__.removeprefix("test_")
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_trainer(example: ModuleType) -> None:
    result = example.main()
    assert result["last_loss"] < 0.8 * result["first_loss"]
    assert result["difference"] == 0


def test_peft_lora(example: ModuleType) -> None:
    for losses in example.main().values():
        assert losses[-1] < 0.8 * losses[0]


def test_save_graft(example: ModuleType) -> None:
    result = example.main()
    assert result["difference"] == 0
    assert result["without"] > 0.1


def test_anchor(example: ModuleType) -> None:
    losses = example.main()
    (own_before, general_before), (own_free, general_free) = losses["base"], losses["no anchor"]
    own, general = losses["anchor"]
    assert max(own, own_free) < 0.2 * own_before  # both learn
    assert general_free > general_before + 2  # one forgets
    assert general < general_before + 0.5


def test_gradient_checkpointing(example: ModuleType) -> None:
    result = example.main()
    assert result["difference"] <= 1e-6
    assert result["checkpointed_bytes"] < 0.5 * result["bytes"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(example: ModuleType, backend: str) -> None:
    torch._dynamo.reset()
    assert max(example.main(backend).values()) <= 1e-6


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_lora(example: ModuleType, backend: str) -> None:
    torch._dynamo.reset()
    losses = example.main(backend, steps=12)
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-3)
    assert losses["compiled"][-2] < 0.9 * losses["compiled"][0]  # of the same length


def test_autocast(example: ModuleType) -> None:
    for losses in example.main().values():
        assert losses[-1] < 0.8 * losses[0]


def test_generate(example: ModuleType) -> None:
    result = example.main(rounds=3)
    assert result["same"]
    assert result["ratio"] > 0.5  # a gross slip shows; figures are taken on a quiet machine


def test_export(example: ModuleType) -> None:
    assert example.main() == {"calls": 2, "difference": pytest.approx(0, abs=1e-5)}


def test_plain_gpt(example: ModuleType) -> None:
    result = example.main()
    assert result["pretraining"][-1] < 0.5 * result["pretraining"][0]
    assert result["finetuning"][-1] < 0.1 * result["finetuning"][0]
    assert "transformers" not in (EXAMPLES / "plain_gpt.py").read_text().partition('"""\n\nimport')[2]


@pytest.mark.slow
def test_fsdp2() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, EXAMPLES / "fsdp2.py"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "parameters are {'DTensor'}, 2 processes" in done.stdout
    assert "model.layers.1.mlp.experts: fused" in done.stdout


@pytest.mark.slow
def test_serve(tmp_path: Path) -> None:
    """A client's grafts behind transformers' own server: its answer is that of `flex generate`, whole and streamed."""
    for extra in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(extra)
    train = {"methods": ("flex",), "rounds": 1, "steps": 3, "graft_learning_rate": 0.3}
    run(tiny_config(tmp_path, train=train, evaluate={"rouge": False}), Console(quiet=True))
    question = "which is larger , 3 or 14 ?"
    words = ["--run", str(tmp_path / "run"), "--client", "a"]
    assert main(["export", *words, "--to", str(tmp_path / "a"), "--merge"]) == 0
    saved = load_saved(tmp_path / "run", "flex", None, with_data=False)
    saved.attach("a")
    wanted = saved.answers("a", [saved.world.encoder.prompt_ids(question)], 6)[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / "serve.py"), str(tmp_path / "a"), "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 180
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.2)
        asked = {"model": str(tmp_path / "a"), "max_tokens": 6, "temperature": 0}
        asked["messages"] = [{"role": "user", "content": question}]
        reply = json.loads(_post(port, asked))
        assert reply["choices"][0]["message"]["content"].strip() == wanted
        lines = [line.removeprefix("data: ") for line in _post(port, {**asked, "stream": True}).splitlines()]
        chunks = [json.loads(line)["choices"] for line in lines if line.startswith("{")]
        said = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk)
        assert said.strip() == wanted
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def _post(port: int, content: dict) -> str:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(content).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return reply.read().decode()


def test_every_example_is_tested() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} - {"tiny_moe"} <= tested
