"""All that is special about measuring on a GPU, and the same for a CPU, so that every line runs without one."""

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
FLUSH_BYTES = 256 << 20  # several times the L2 of any chip
PACKAGES = ("torch", "triton", "transformers")
# `torch.cuda._sleep` counts the chip's cycles; a faster clock waits a little less.
CYCLES_A_SECOND, MOST_SECONDS_AHEAD = 2e9, 4e-3


class Device:
    """A CUDA device. Times are in milliseconds, of the device's own clock."""

    kind = "cuda"
    least_rounds, most_rounds = 5, 50

    def __init__(self) -> None:
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.kind)

    def describe(self) -> dict[str, str]:
        """What must be the same for figures to stand in one file."""
        driver = "unknown"
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
            driver = lines[0].strip()
        return {"device": torch.cuda.get_device_name(), "driver": driver, **_versions()}

    @property
    def memory_bytes(self) -> int | None:
        return torch.cuda.get_device_properties(0).total_memory

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def time(self, runs: dict[str, Run], seconds: float) -> dict[str, list[float]]:
        """The runs take turns, so that a change of the clock meets all of them; L2 is flushed before each.

        Before each the device waits until the host has queued the whole run, where a run does not ask the device
        itself: what is measured are the kernels and not Python. How long the host takes, `wall_ms` says.
        """
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
        rounds = self._rounds(runs, seconds)
        ahead = {name: self._cycles_ahead(run) for name, run in runs.items()}
        for _ in range(rounds):
            for name, run in runs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(ahead[name])
                self._flushed.zero_()
                start.record()
                run()
                end.record()
                events[name].append((start, end))
            self.synchronize()
        return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}

    def wall_ms(self, run: Run) -> float:
        """Milliseconds of the clock on the wall a call, many calls in a row: with few tokens the host's time."""
        run()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(self.most_rounds):
            run()
        self.synchronize()
        return (time.perf_counter() - start) * 1e3 / self.most_rounds

    def peak_bytes(self, run: Run) -> int | None:
        """The most memory in use during the run beyond what was there before it."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def kernels(self, run: Run) -> dict[str, list[float]] | None:
        """{kernel: [its microseconds together, launches]}, the longest first; copies and fills are left out.

        None where the profiler is not allowed to see them.
        """
        self.synchronize()
        try:
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                run()
                self.synchronize()
        except (RuntimeError, AssertionError):
            return None
        kinds = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return by_kernel((event.name, event.self_device_time_total) for event in kinds) or None

    def launches(self, run: Run) -> int | None:
        return count_launches(self.kernels(run))

    def graphed(self, run: Run) -> Run:
        """The run as a CUDA graph; raises what capturing raises."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()

        def replay() -> object:
            graph.replay()
            return kept

        return replay

    def release(self) -> None:
        torch.cuda.empty_cache()

    def _cycles_ahead(self, run: Run) -> int:
        """Cycles of the device in which the host queues a run, with room; the run has been warmed up."""
        self.synchronize()
        start = time.perf_counter()
        run()
        host_seconds = time.perf_counter() - start
        self.synchronize()
        return int(min(1.5 * host_seconds, MOST_SECONDS_AHEAD) * CYCLES_A_SECOND)

    def _rounds(self, runs: dict[str, Run], seconds: float) -> int:
        for run in runs.values():  # compiles, and finds its algorithms
            run()
            run()
        self.synchronize()
        start = time.perf_counter()
        for run in runs.values():
            run()
        self.synchronize()
        once = max(time.perf_counter() - start, 1e-6)
        return int(max(self.least_rounds, min(self.most_rounds, seconds / once)))


class Cpu(Device):
    """The twin that the tests run: no events, no caches to flush, no graphs."""

    kind = "cpu"
    memory_bytes = None
    least_rounds = most_rounds = 2

    def __init__(self) -> None:
        pass

    def describe(self) -> dict[str, str]:
        return {"device": platform.processor() or platform.machine(), "driver": "none", **_versions()}

    def synchronize(self) -> None:
        pass

    def time(self, runs: dict[str, Run], seconds: float) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self._rounds(runs, seconds)):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) * 1e3)
        return times

    def peak_bytes(self, run: Run) -> None:
        run()

    def kernels(self, run: Run) -> dict[str, list[float]] | None:
        """PyTorch's operations in place of kernels."""
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run()
        return by_kernel((event.name, event.self_cpu_time_total) for event in profiled.events()) or None

    def graphed(self, run: Run) -> Run:
        run()
        return run

    def release(self) -> None:
        pass


def by_kernel(events: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    """{name: [microseconds together, how many]} of (name, microseconds), the longest first."""
    found: dict[str, list[float]] = {}
    for name, microseconds in events:
        if not name.startswith(("Memcpy", "Memset")):
            entry = found.setdefault(name, [0.0, 0])
            entry[0] += microseconds
            entry[1] += 1
    return dict(sorted(found.items(), key=lambda pair: -pair[1][0]))


def count_launches(kernels: dict[str, list[float]] | None) -> int | None:
    return None if kernels is None else int(sum(count for _, count in kernels.values()))


def summary(times: list[float]) -> dict[str, float | int]:
    """The median and how far the others are from it."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
    spread = {"ms_low_quartile": low, "ms_high_quartile": high, "ms_min": min(times), "ms_max": max(times)}
    return {"ms": statistics.median(times), **spread, "rounds": len(times)}


def _versions() -> dict[str, str]:
    found = {package: version(package) for package in PACKAGES}
    return {**found, "cuda": str(torch.version.cuda), "python": platform.python_version()}
