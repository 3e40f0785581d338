"""What is kept of the base, and what it costs in skill of one's own: every kind of anchor, and the rivals with one.

    python -m benchmarks.knowledge run --out runs/knowledge [--seeds 41 42] [--cells flex flex-distill-0.1]
    python -m benchmarks.knowledge run --out runs/knowledge --base BASE --dolly DATA/dolly --anchors TEXT --held TEXT
    python -m benchmarks.knowledge page --out runs/knowledge     # docs/knowledge.md, benchmarks/results/knowledge.json
    python -m benchmarks.knowledge cost                          # of a client's turn

The second line is of Dolly's clients (`cells.RealText` says what it needs). Called again it goes on where it was
stopped. `runs/knowledge` keeps every job; the page is made from what is there.
"""

import argparse
import dataclasses
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from benchmarks.knowledge import cost
from benchmarks.knowledge.cells import CELLS, CHOOSING, DOLLY, TEST, RealText
from benchmarks.knowledge.jobs import config_of, is_left, run_job
from benchmarks.knowledge.page import write_page

FILES = tuple(field.name for field in dataclasses.fields(RealText))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page", "cost"))
    parser.add_argument("--out", type=Path, default=Path("runs/knowledge"))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
    )
    for name in FILES:
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.what != "run":
        write_page(arguments.out) if arguments.what == "page" else cost.show()
        return 0
    files = [getattr(arguments, name) for name in FILES]
    if any(files) and not all(files):
        parser.error(f"Dolly needs all of --{', --'.join(FILES)}")
    given = RealText(*files) if all(files) else None
    out = arguments.out / "dolly" if given else arguments.out
    seeds = arguments.seeds or (DOLLY if given else (*CHOOSING, *TEST))
    jobs = [(name, seed) for seed in seeds for name in arguments.cells if is_left(name, seed, out)]
    for name, seed in jobs:  # the data first, so that no two jobs write them
        config_of(name, seed, out, given)
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_job, *job, out, given) for job in jobs]
        for number, future in enumerate(as_completed(futures), 1):
            print(f"{number}/{len(jobs)} {future.result()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
