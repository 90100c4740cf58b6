"""A benchmark in parts that are kept, so that one which was stopped goes on where it was."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ftnb.plan import write_text


def gathered(
    todo: Iterable[tuple[str, Callable]],  # name of a part, function that makes its results
    work: Path,  # folder where they are kept
    budget: float | None = None,  # seconds after which no part is begun; None: all
    prefix: str = "",  # of the files' names
) -> dict:  # name -> results, as JSON gives them back
    "Results by part, those before the end of the budget."
    begun, results = time.perf_counter(), {}
    for name, make in todo:
        file = work / f"{prefix}{name.replace(' ', '-')}.json"
        if not file.exists():
            if budget is not None and time.perf_counter() - begun > budget:
                print(f"stopped before part {name}: run again to go on", file=sys.stderr)
                break
            start = time.perf_counter()
            write_text(file, json.dumps(make()))
            print(f"part {name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        results[name] = json.loads(file.read_text("utf-8"))
    return results
