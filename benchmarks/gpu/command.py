"""The layer, its parts and a whole training step on a GPU, beside every peer (`make bench-gpu`).

    python -m benchmarks.gpu [--part first|ceilings|layers|plan|scoring|small|step|sanitize|round|tiles|sweep ...]
        [--minutes N]

Every measurement is written at once; a call that ran out of minutes, or was killed, is gone on with by the next one.
Nothing is measured before it was held against transformers' `eager` in the same process. Figures go to
`benchmarks/results/<device>.json`, pictures beside it, the table to a section of its own in `benchmarks/RESULTS.md`.
`--output FOLDER` writes all three there instead, and goes on from what is in `benchmarks/results`; `--report FILE`
makes table and pictures from a file of figures.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import (
    ceilings,
    first_part,
    layer_part,
    pictures,
    plan_part,
    predict,
    scoring,
    small,
    step,
    sweep,
    table,
    tile_part,
)
from benchmarks.gpu.device import Cpu, Device
from benchmarks.gpu.record import OURS, Key, Record
from benchmarks.gpu.session import DeviceLost, OutOfTime, Session
from flex_kernels.backends import native

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SANITIZER_TOOLS = ("memcheck", "racecheck")


def sanitize(session: Session) -> None:
    """`compute-sanitizer` over the tests of csrc's CUDA code; it looks into csrc's kernel alone."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    for tool in SANITIZER_TOOLS:
        if not session.wanted("sanitize", "csrc", 0, tool):
            continue
        key = Key("sanitize", "csrc", 0, tool, OURS)
        if session.device.kind == "cpu" or program is None or native.cuda_module() is None:
            session.record.skip(key, "needs a device, compute-sanitizer, and csrc's CUDA code built")
            continue
        tests = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/flex_kernels/test_kernels_gpu.py",
        ]
        command = [program, "--tool", tool, "--kernel-name", "kernel_substring=routing_plan_kernel", "--error-exitcode"]
        command += ["9", *tests, "-k", "routing_plan and [cuda"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
        try:
            said, _ = process.communicate(timeout=max(session.seconds_left(), 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tests run in a child of the sanitizer
            process.communicate()
            raise OutOfTime from None
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*|\d+ passed.*", said)
        if any("SUMMARY" in line for line in found) and any("passed" in line for line in found):
            session.record.add(key, clean=process.returncode == 0, said=found[-3:])
        else:
            session.record.skip(key, f"it says nothing of csrc: {said.strip()[-200:]}")


# In the order of what is most wanted, should the minutes end.
PARTS: dict[str, Callable[[Session], None]] = {
    "first": first_part.measure,
    "ceilings": ceilings.measure,
    "layers": layer_part.measure,
    "plan": plan_part.measure,
    "scoring": scoring.measure,
    "small": small.measure,
    "step": step.measure,
    "sanitize": sanitize,
    "round": step.measure_rounds,
    "tiles": tile_part.measure,
    "sweep": sweep.measure,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [part for part in PARTS if part not in ("tiles", "sweep")]
    parser.add_argument("--part", nargs="+", choices=PARTS, default=default, help="default: all but the last two")
    parser.add_argument("--minutes", type=float, default=9.5, help="begin nothing new after this time (default: 9.5)")
    parser.add_argument("--output", type=Path, help="a folder, or the JSON file (default: named after the device)")
    parser.add_argument("--table", type=Path, help="the Markdown file whose section is replaced")
    parser.add_argument("--report", type=Path, metavar="FILE", help="measure nothing; table and pictures of this file")
    parser.add_argument("--again", action="store_true", help="measure what is in the file once more")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="every line in no time, on one tiny layer in fp32")
    parser.add_argument("--jobs", type=int, help="compilers at a time (default: as many as processors)")
    parser.add_argument("--without", nargs="+", default=[], metavar="PEER", help="peers to leave out, for time")
    parser.add_argument("--predict", action="store_true", help="print what arithmetic predicts and measure nothing")
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.predict:
        print("\n".join(predict.lines()))
        return 0
    table_file = given.table or ROOT / "benchmarks" / "RESULTS.md"
    command = "python -m benchmarks.gpu " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    if given.report:
        record = Record.open(given.report, json.loads(given.report.read_text())["machine"])
        table.write(record, table_file, record.command)
        pictures.draw(record)
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny shows that every line works")
    device = Device() if given.device == "cuda" else Cpu()
    machine = {**device.describe(), **({"sizes": "tiny"} if given.tiny else {})}
    name = f"{slug(machine['device'])}.json"
    output = given.output or RESULTS / name
    if output.suffix != ".json":
        output.mkdir(parents=True, exist_ok=True)
        table_file, output = given.table or output / "RESULTS.md", output / name
        if not output.exists() and Record.fits(RESULTS / name, machine):
            shutil.copy(RESULTS / name, output)
    if given.first_call:
        print(json.dumps(small.first_call(Session(device, Record(output, machine), given.tiny, 600.0))))
        return 0
    try:
        record = Record.open(output, machine)
    except ValueError as error:
        parser.error(str(error))
    seconds, without = 60 * given.minutes, frozenset(given.without)
    session = Session(device, record, given.tiny, seconds, given.again, given.jobs, without)
    record.command = command.strip()
    try:
        return measure(session, given.part)
    finally:
        if given.device == "cuda" or given.table:
            table.write(record, table_file, record.command)
            pictures.draw(record)
        print(f"figures: {output}")


def measure(session: Session, parts: list[str]) -> int:
    """0: all is measured, 3: the time was up, 1: a part failed; the other parts are measured all the same.

    Where the device was lost there is no other part.
    """
    code = 0
    for part in parts:
        session.record.skipped.pop(Key(part, "all", 0, "part", OURS), None)
        try:
            PARTS[part](session)
        except OutOfTime:
            print("The minutes are spent; the same command goes on from here.")
            return 3
        except DeviceLost as error:
            print(error)
            return 1
        except Exception as error:
            if session.tiny:
                raise
            session.record.skip(Key(part, "all", 0, "part", OURS), f"{type(error).__name__}: {error}")
            code = 1
            try:
                session.device.synchronize()
                session.device.release()
            except RuntimeError:
                print(f"the device is lost after {part}: {error}")
                return code
    return code


def slug(device: str) -> str:
    """ "NVIDIA H200" -> "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-") or "device"
