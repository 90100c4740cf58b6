"""Does ftnb still work with the newest transformers, trl and peft, and if not, which name changed?

    python tools/canary.py [--venv .venv-canary] [--here] [--names-only]

Makes a fresh environment without constraints.txt, puts the newest of each library in it, and then: looks up every name
that ftnb takes from them, and every keyword it calls them with; runs the tests and notebooks that lean on them most.
--here checks the environment that runs it and installs nothing. Exit code 1 when anything has changed.
"""

import argparse
import ast
import importlib
import inspect
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEWEST = ("transformers", "trl", "peft")
WATCHED = (*NEWEST, "accelerate", "datasets")
NOTEBOOKS = ("02_format", "03_model", "04_train", "05_evaluate", "06_deploy")
TESTS = ("tests/test_format.py", "tests/test_methods.py", "tests/test_tools.py", "tests/test_labels.py")
TORCH = os.environ.get("FTNB_TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
sys.path.insert(0, str(ROOT / "tools"))


def used(folder: Path) -> list[tuple[str, int, str, str, ast.AST]]:
    "Every name that the modules of a folder take from the watched libraries: file, line, library module, name, tree."
    found = []
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in WATCHED:
                found += [(path.name, node.lineno, node.module, a.name, tree) for a in node.names]
    return found


def look_up(module: str, name: str):
    "The thing itself; raises `ImportError` or `AttributeError` where it is gone."
    loaded = importlib.import_module(module)
    return getattr(loaded, name) if hasattr(loaded, name) else importlib.import_module(f"{module}.{name}")


def refused(thing, name: str, tree: ast.AST) -> list[str]:
    "Keywords that a module calls a library's function or class with, and that it no longer takes."
    try:
        taken = inspect.signature(thing).parameters
    except (TypeError, ValueError):
        return []
    own = any(getattr(n, "name", "") == name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
    if own or any(
        p.kind is p.VAR_KEYWORD for p in taken.values()
    ):  # the module has a function of that name itself
        return []
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == name)
    return sorted({k.arg for call in calls for k in call.keywords if k.arg and k.arg not in taken})


def changed(folder: Path) -> list[str]:
    "One line for each name or keyword that is gone."
    lines = []
    for file, line, module, name, tree in used(folder):
        try:
            thing = look_up(module, name)
        except (ImportError, AttributeError, RuntimeError) as error:
            lines.append(f"{file}:{line}: {module}.{name} is gone ({type(error).__name__}: {error})")
            continue
        lines += [f"{file}: {module}.{name} no longer takes {k}=" for k in refused(thing, name, tree)]
    return lines


def tested() -> dict[str, str]:
    "Library -> the version in constraints.txt."
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def install(venv: Path) -> Path:
    "A fresh environment with the newest of everything; its interpreter."
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    from install import answers, compiler, llama_env, pin

    # the wheels for processors alone; where this index does not answer, the large ones do as well
    if sys.platform == "linux" and answers(TORCH):
        subprocess.run([*pip, "torch", "--index-url", TORCH], check=False)
    subprocess.run([*pip, "--upgrade", "-e", f"{ROOT}[dev]", *NEWEST], check=True)
    subprocess.run([*pip, "--no-deps", "--require-hashes", "-r", ROOT / "assets.txt"], check=True)
    if compiler():  # 06_deploy converts with it; of llama.cpp the tested one, as it is not what is watched
        build = [*pip, "--no-cache-dir", pin("llama-cpp-python")]
        subprocess.run(build, check=True, env=os.environ | llama_env())
    return python


def here(names_only: bool) -> int:
    "Check the environment that runs this."
    pins = tested()
    for name in WATCHED:
        now = version(name)
        print(f"{name:<13} {now:<10} " + ("as tested" if now == pins[name] else f"tested: {pins[name]}"))
    lines = changed(ROOT / "ftnb")
    print(f"{len(used(ROOT / 'ftnb'))} names looked up, {len(lines)} changed", *lines, sep="\n  ", flush=True)
    failed = bool(lines)
    if not names_only:
        notebooks = list(NOTEBOOKS)
        if not find_spec("llama_cpp"):
            notebooks.remove("06_deploy")
            print("left out, for want of llama-cpp-python: 06_deploy", flush=True)
        chosen = " or ".join(notebooks)
        for words in ([*TESTS], ["tests/test_notebooks.py", "-k", chosen]):
            done = subprocess.run([sys.executable, "-m", "pytest", *words, "--tb=short"], cwd=ROOT)
            failed |= done.returncode != 0
    return int(failed)


def main() -> int:
    "Exit code 1 when a name, a keyword or a test has changed."
    parser = argparse.ArgumentParser(description="Does ftnb work with the newest transformers, trl and peft?")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-canary", help="made anew")
    parser.add_argument("--here", action="store_true", help="check this environment; install nothing")
    parser.add_argument("--names-only", action="store_true", help="look names up; run no test")
    told = parser.parse_args()
    if told.here:
        return here(told.names_only)
    python = install(told.venv)
    words = ["--here", *(["--names-only"] if told.names_only else [])]
    return subprocess.run([python, __file__, *words], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
