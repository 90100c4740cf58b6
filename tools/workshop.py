"""Make the archive of the workshops, measure how long they take, or list the wheels they need.

    python tools/workshop.py [--out FILE.zip] [--with-wheels DIR]   the archive (make workshop)
    python tools/workshop.py --measure [NAME ...]                   run notebooks 10 to 19, write docs/workshop.json
    python tools/workshop.py --lock                                 write docs/wheels.txt from what is installed here

--with-wheels puts every wheel into the archive; those that DIR lacks are fetched into it first, through pip and as
pip is configured. --measure runs each notebook in a process of its own at the size that FTNB_ROWS asks for, on one core
(OMP_NUM_THREADS): two end sooner and take more CPU seconds, as they wait for each other.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ftnb import __version__  # noqa: E402
from ftnb.plan import InputError, write_text  # noqa: E402
from ftnb.workshop import Wheel, build, code_hash, read_wheels, read_workshop, wheel_of  # noqa: E402

ROOTS = ("ftnb[grammar,widget]", "jupyterlab")  # what a class needs, with all that these need
LIST, TIMES = ROOT / "docs" / "wheels.txt", ROOT / "docs" / "workshop.json"
SLOW = 5.0  # seconds from which a cell is named on the teacher's page
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def pip(*arguments: str, **variables: str) -> None:
    "Run pip; raises `InputError` with its last error."
    done = subprocess.run(
        [*PIP, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **variables}
    )
    if done.returncode:
        lines = [x for x in done.stderr.splitlines() if x.startswith("ERROR")] or done.stderr.splitlines()[
            -1:
        ]
        raise InputError(f"pip {arguments[0]} failed: {lines[0] if lines else 'it did not say why'}")


def own_wheel(folder: Path) -> Path:
    "A wheel of ftnb, made from a copy so that nothing is left in the repository; the same source, the same bytes."
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "ftnb", source / "ftnb", ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    pip("wheel", *options, source, SOURCE_DATE_EPOCH="315532800")
    return next(folder.glob("ftnb-*.whl"))


def installed() -> dict[str, str]:
    "Package -> version of all that `ROOTS` need, as it is installed here and was tested."
    found, todo, done = {}, [Requirement(r) for r in ROOTS], set()
    while todo:
        need = todo.pop()
        key = (canonicalize_name(need.name), frozenset(need.extras))
        if key in done:
            continue
        done.add(key)
        try:
            package = distribution(need.name)
        except PackageNotFoundError:
            raise InputError(f"{need.name} is not installed here; run  make install") from None
        found[key[0]] = package.version
        for line in package.requires or ():
            wanted = Requirement(line)
            marker = wanted.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *need.extras)):
                todo.append(wanted)
    found.pop("ftnb")
    return found


def assets() -> list[Wheel]:
    "The wheels that carry the default model and data."
    lines = (ROOT / "assets.txt").read_text("utf-8").splitlines()
    return read_wheels("\n".join(line for line in lines if not line.startswith("#")))


def lock() -> None:
    "docs/wheels.txt: the versions installed here, with the hashes that pip reports for their wheels."
    with tempfile.TemporaryDirectory() as folder:
        names, report = Path(folder) / "names.txt", Path(folder) / "report.json"
        names.write_text("".join(f"{n}=={v}\n" for n, v in sorted(installed().items())), "utf-8")
        options = ("--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:", "--quiet")
        pip("install", *options, "--report", report, "-r", names)
        found = []
        for item in json.loads(report.read_text("utf-8"))["install"]:
            digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
            name = canonicalize_name(item["metadata"]["name"])
            found.append(Wheel(name, item["metadata"]["version"], digest))
    head = f"# python: {sys.version_info[0]}.{sys.version_info[1]}\n# platform: {platform.system()} {platform.machine()}\n"
    head += "# Made by  python tools/workshop.py --lock  from an environment that passed the tests.\n"
    lines = sorted(map(str, [*found, *assets()]))
    write_text(LIST, head + "\n".join(lines) + "\n")
    print(f"{LIST.relative_to(ROOT)}: {len(lines)} wheels")


def fetched(folder: Path, own: Path) -> list[Path]:
    "Every wheel of the list in `folder`, those it lacks fetched; and ftnb's own."
    folder.mkdir(parents=True, exist_ok=True)
    listed = read_wheels(LIST.read_text("utf-8"))
    have = {str(wheel_of(p)): p for p in sorted(folder.glob("*.whl"))}
    missing = [w for w in listed if str(w) not in have]
    if missing:
        print(f"{len(missing)} of {len(listed)} wheels are fetched into {folder} ...", flush=True)
        with tempfile.TemporaryDirectory() as place:
            names = Path(place) / "names.txt"
            names.write_text("".join(f"{w}\n" for w in missing), "utf-8")
            pip("download", "--quiet", "--no-deps", "--require-hashes", "-r", names, "--dest", folder)
        have = {str(wheel_of(p)): p for p in sorted(folder.glob("*.whl"))}
    return [own, *(have[str(w)] for w in listed if str(w) in have)]


def workshops(names: list[str]) -> list[Path]:
    "Notebooks 10 to 19, or those of them that are named."
    found = {p.stem: p for p in sorted((ROOT / "nbs").glob("1[0-9]_*.ipynb"))}
    for name in names:
        if name not in found:
            raise InputError(f"no workshop {name!r}; there are {', '.join(found) or 'none'}")
    return [found[n] for n in (names or found)]


def spent() -> float:
    "CPU seconds of this process and of those it started."
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def run(notebook: Path) -> dict:
    "What each section and each slow cell of a notebook took; raises `InputError` for a cell that failed."
    from execnb.shell import CaptureShell

    workshop, shell = read_workshop(notebook), CaptureShell(notebook.parent)
    sections = [{"title": s.title, "wall": 0.0, "cpu": 0.0} for s in workshop.sections]
    begin, used, slow = time.monotonic(), spent(), []
    for n in workshop.runs:
        where = next((i for i, s in enumerate(workshop.sections) if n in s.cells), None)
        source, wall, cpu = workshop.cells[n]["source"], time.monotonic(), spent()
        shell.run(source)
        if shell.exc:
            raise InputError(f"{notebook.name}, cell {n + 1}: {type(shell.exc).__name__}: {shell.exc}")
        took = {"wall": round(time.monotonic() - wall, 2), "cpu": round(spent() - cpu, 2)}
        if where is not None:
            for key, seconds in took.items():
                sections[where][key] = round(sections[where][key] + seconds, 2)
        if took["wall"] > SLOW:
            lines = [x for x in source.splitlines() if x.strip() and not x.startswith("#")]
            title = workshop.sections[where].title if where is not None else ""
            slow.append({"section": title, "first": lines[0][:80] if lines else "", **took})
    total = {"wall": round(time.monotonic() - begin, 1), "cpu": round(spent() - used, 1)}
    return {**total, "sections": sections, "cells": slow}


def measure(names: list[str]) -> None:
    "docs/workshop.json, each notebook in a process of its own."
    kept = json.loads(TIMES.read_text("utf-8"))["notebooks"] if TIMES.exists() else {}
    alive = {p.stem for p in workshops([])}
    for notebook in workshops(names):
        code = "import sys; sys.path.insert(0, sys.argv[1]); import workshop; workshop.one(sys.argv[2])"
        command = [sys.executable, "-c", code, str(ROOT / "tools"), str(notebook)]
        env = {"HF_HUB_OFFLINE": "1", "IN_TEST": "1", "OMP_NUM_THREADS": "1", **os.environ}
        env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=notebook.parent)
        if done.returncode:
            raise InputError((done.stderr.strip().splitlines() or ["it did not say why"])[-1])
        found = json.loads(done.stdout.splitlines()[-1])
        rows = os.environ.get("FTNB_ROWS")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        machine = f"{env['OMP_NUM_THREADS']} of {cores} cores"
        about = {"code": code_hash(notebook), "rows": int(rows) if rows else None, "machine": machine}
        kept = {n: t for n, t in kept.items() if n in alive} | {notebook.stem: about | found}
        write_text(TIMES, json.dumps({"notebooks": dict(sorted(kept.items()))}, indent=1) + "\n")
        print(f"{notebook.stem}: {found['wall']:.0f} s, {found['cpu']:.0f} CPU seconds", flush=True)


def one(notebook: str) -> None:
    "The inner process of `measure`: its last line is JSON."
    print("\n" + json.dumps(run(Path(notebook))))


def main(arguments: list[str]) -> int:
    "Exit code 0 when what was asked for is written; 2 when something stood in the way."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=f"dist/ftnb-workshop-{__version__}.zip", help="the archive to write")
    parser.add_argument("--with-wheels", metavar="DIR", help="put all wheels in; fetch those that DIR lacks")
    parser.add_argument("--measure", nargs="*", metavar="NAME", help="run the workshops, or those named")
    parser.add_argument("--lock", action="store_true", help="list the wheels of this environment")
    args = parser.parse_args(arguments)
    try:
        if args.measure is not None:
            measure(args.measure)
            return 0
        if args.lock:
            lock()
            return 0
        with tempfile.TemporaryDirectory() as folder:
            own = own_wheel(Path(folder))
            wheels = fetched(Path(args.with_wheels), own) if args.with_wheels else [own]
            archive = build(ROOT, args.out, wheels)
    except InputError as error:
        print(f"workshop: {error}", file=sys.stderr)
        return 2
    size = archive.path.stat().st_size / 1e6
    print(f"{archive.path}: {len(archive.sizes)} files, {size:,.1f} MB, sha256 {archive.sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
