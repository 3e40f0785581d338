"""Does it matter what the graft is made of? Every criterion and control at equal parameters and steps.

    python -m benchmarks.study run --out runs/study [--settings demo demo-20] [--variants rule random]
    python -m benchmarks.study run --out runs/study --settings dolly-4 dolly-10 --base BASE --dolly DATA/dolly
    python -m benchmarks.study page --out runs/study      # docs/choosing-the-graft.md, benchmarks/results/choosing.json

Called again it goes on where it was stopped. `runs/study` keeps every job; the page is made from what is there.
"""

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from benchmarks.study.jobs import run_job
from benchmarks.study.page import write_page
from benchmarks.study.variants import SETTINGS, VARIANTS, configure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["demo", "demo-20"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--dolly", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.what == "page":
        write_page(arguments.out)
        return 0
    jobs = [
        (setting, variant, seed)
        for setting in arguments.settings
        for seed in arguments.seeds or SETTINGS[setting].seeds
        for variant in arguments.variants or SETTINGS[setting].variants or VARIANTS
        if not (arguments.out / setting / variant / f"seed{seed}" / "metrics.jsonl").exists()
    ]
    for setting, _, seed in {(job[0], "", job[2]) for job in jobs}:  # the data first, so that no two jobs write them
        configure(setting, next(iter(VARIANTS)), seed, arguments.out, arguments.base, arguments.dolly)
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_job, job, arguments.out, arguments.base, arguments.dolly) for job in jobs]
        for number, future in enumerate(as_completed(futures), 1):
            print(f"{number}/{len(jobs)} {future.result()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
