"""A benchmark in parts that are kept, so that one which was stopped goes on where it was."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from ftnb.plan import cache_dir, write_text


def parser(
    doc: str,  # of the benchmark; its first line is shown
    folders: str,  # that --data holds
    quick: str,  # how long --quick takes
) -> argparse.ArgumentParser:  # with the options that such benchmarks share
    "Where the data are, where results and finished parts go, and how much is done."
    made = argparse.ArgumentParser(description=doc.split("\n")[0])
    made.add_argument("--data", type=Path, default=Path("../shared/data"), help=f"folder with {folders}")
    made.add_argument("--out", type=Path, help="JSON file to write")
    made.add_argument("--work", type=Path, help="folder for finished parts")
    made.add_argument("--budget", type=float, help="seconds after which no part is begun")
    made.add_argument("--quick", action="store_true", help=f"few rows of everything, in {quick}")
    return made


def placed(
    options: argparse.Namespace,  # of `parser`
    name: str,  # of the benchmark, and of its folder in the cache
    *wanted: str,  # files that --data must hold
) -> argparse.Namespace:  # the same, with a folder for parts
    "Options with their folder; ends the program where a file is missing."
    if missing := [file for file in wanted if not (options.data / file).is_file()]:
        sys.exit(f"no {', '.join(missing)} in {options.data}")
    options.work = options.work or cache_dir() / (f"{name}-quick" if options.quick else name)
    return options


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


def said_version(
    program: str,  # name on PATH, or path; ftnb | llama-server | vllm
) -> str:
    "What the program says of its version; the wheel's where it is no program."
    if program == "ftnb":
        return version("ftnb")
    if not shutil.which(program):
        return f"xllamacpp {version('xllamacpp')}"
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=300)
    words = [line for line in (done.stdout + done.stderr).splitlines() if any(map(str.isdigit, line))]
    return next((w for w in words if re.fullmatch(r"(version: )?[\w.+() -]+", w)), "not said")[:80]
