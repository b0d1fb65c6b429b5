"""``make bench``: run every benchmark (or those named), print a table, write outputs/bench/results.json.

Example: python -m tests.benchmarks main_job --seeds 1
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path

from components.common.storage import write_json
from tests.benchmarks.measure import Row, machine, table

HERE = Path(__file__).resolve().parent


def main() -> int:
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every number about accuracy")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(known)
    if unknown:
        parser.error(f"unknown benchmark: {', '.join(sorted(unknown))} (known: {', '.join(known)})")
    results: dict[str, list[Row]] = {}
    for name in arguments.names or known:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = importlib.import_module(f"tests.benchmarks.bench_{name}").measure(arguments.seeds)
        print(f"\n{name}\n{table(results[name])}\n", flush=True)
    path = HERE.parents[1] / "outputs" / "bench" / "results.json"
    write_json(
        path,
        {
            "machine": machine(),
            "results": {name: [dataclasses.asdict(row) for row in rows] for name, rows in results.items()},
        },
    )
    missed = sum(row.holds is False for rows in results.values() for row in rows)
    held = "every number holds" if any(results.values()) else "nothing could be measured"
    print(f"{path}: {missed} numbers missed" if missed else f"{path}: {held}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
