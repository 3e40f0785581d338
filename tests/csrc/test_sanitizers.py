"""csrc under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, by `sanitize/driver.cpp`.

ThreadSanitizer cannot see into the OpenMP runtime, so that build has none: `parallel.cpp` then uses std::thread.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC, DRIVER = ROOT / "csrc", ROOT / "tests" / "csrc" / "sanitize" / "driver.cpp"
COMPILER = os.environ.get("CXX") or shutil.which("g++")
BUILDS = {
    "address": ["-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


def compile_driver(name: str) -> Path:
    """Into build/, only what changed; one object per source, as many compilers as processors."""
    folder = ROOT / "build" / f"sanitize-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wno-psabi", f"-I{CSRC}", *BUILDS[name]]
    newest_header = max(header.stat().st_mtime for header in CSRC.rglob("*.h"))

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, newest_header):
            command = [COMPILER, *flags, "-c", str(source), "-o", str(target)]
            subprocess.run(command, check=True, capture_output=True, text=True)
        return target

    sources = [source for source in sorted(CSRC.rglob("*.cpp")) if not source.stem.startswith("bindings")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*sources, DRIVER]))
    subprocess.run([COMPILER, *flags, *map(str, objects), "-o", str(folder / "driver"), "-pthread"], check=True)
    return folder / "driver"


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", sorted(BUILDS))
def test_sanitizers(name: str) -> None:
    try:
        driver = compile_driver(name)
    except subprocess.CalledProcessError as error:
        if "cannot find -l" in (error.stderr or ""):
            pytest.skip(f"the compiler has no {name} sanitizer")
        raise AssertionError(error.stderr) from error
    # Without a fixed layout of memory, ThreadSanitizer of GCC 12 does not start on kernels that randomise more of it.
    fixed = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
    environment = {**os.environ, "OMP_NUM_THREADS": "4", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([*fixed, str(driver)], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "ok"
