"""Serving speed with the answers compared: `ftnb serve` beside llama-cpp-python's server, llama.cpp's own server,
`transformers serve`, `generate` of transformers row by row and in batches of 16, and vLLM with the merged model and with
the adapter, on one run of the store assistant.

    python benchmarks/serve.py --run RUN [--out FILE] [--work DIR] [--rounds 3] [--levels 1,4,16,64] [--extra DIR]
        [--ours "--slots 16"] [--llama-server PATH] [--vllm PATH] [--vllm-options "--enforce-eager"] [--only NAMES]
        [--threads 2] [--budget SECONDS] [--quick]

RUN is a finished run with the exports gguf-q8_0, merged and, for vLLM, adapter. llama-cpp-python's server needs three
packages that ftnb does not: pip install --no-deps --target DIR "starlette-context==0.3.6" pydantic-settings
sse-starlette, and --extra DIR. `transformers serve` needs typer and openai; vLLM, where it is found, may lie in an
environment of its own. Servers run one at a time, as child processes on a free port of 127.0.0.1 with the same number
of threads, in an order that turns from round to round. Each level runs for a fixed time; what still runs then counts as
waiting longer than that. Finished levels are kept in --work, so a run that was stopped goes on where it was; delete a
file there to measure its level again. Needs the machine for itself, for about a quarter of an hour.
Prints Markdown tables; --out writes the numbers as JSON.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}
os.environ["PYTHONDONTWRITEBYTECODE"] = ""  # servers start from compiled files, as for most people

import psutil  # noqa: E402
from parts import gathered, said_version  # noqa: E402

from ftnb.bench import Load, Reply, bench, load_table, pooled, speed_ratio, summary  # noqa: E402
from ftnb.data import load_records  # noqa: E402
from ftnb.deploy import Artifact  # noqa: E402
from ftnb.endpoint import other_command, program_command  # noqa: E402
from ftnb.evaluate import Report, rate  # noqa: E402
from ftnb.format import messages_for  # noqa: E402
from ftnb.model import load_tokenizer  # noqa: E402
from ftnb.plan import InputError, Recipe, write_text  # noqa: E402

SECONDS = {1: 6.0, 4: 7.0, 16: 10.0, 64: 15.0}  # of a level; long enough for a serial server to answer a few
OURS, THEIRS, SERVE = "ftnb serve", "llama-cpp-python server", "transformers serve"
BATCH, CPP = "transformers serve, continuous batching", "llama.cpp's own server"
VLLM, LORA = "vLLM, merged", "vLLM, adapter"
EXPORTS = {VLLM: "merged", LORA: "adapter"}
LOOPS = {"generate, one by one": 1, "generate, 16 at a time": 16}
SYSTEMS = (OURS, THEIRS, CPP, SERVE, BATCH, VLLM, LORA, *LOOPS)
GOALS = (  # the first over the second, at this many clients, at least so many times
    (OURS, THEIRS, 1, 1.0),
    (OURS, THEIRS, 16, 2.0),
    (OURS, "generate, one by one", 16, 5.0),
    (OURS, "generate, one by one", 1, 5.0),
    (OURS, "generate, 16 at a time", 16, 1.0),
    (OURS, SERVE, 1, 1.0),
    (OURS, SERVE, 16, 1.0),
    (OURS, BATCH, 16, 1.0),
    (OURS, CPP, 1, 1.0),
    (OURS, CPP, 16, 1.0),
    (OURS, VLLM, 1, 1.0),
    (OURS, VLLM, 16, 1.0),
    (VLLM, LORA, 1, 1.0),
    (VLLM, LORA, 16, 1.0),
)


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def command(name, args, port):  # of a server, and fields that each request needs
    run, here = Path(args.run).resolve(), ["--host", "127.0.0.1", "--port", str(port)]
    gguf, merged = run / "exports/gguf-q8_0/model.gguf", run / "exports/merged"
    if name == OURS:
        told = [sys.executable, "-m", "ftnb.cli", "serve", str(run), *here, "--kind", "gguf-q8_0"]
        return told + shlex.split(args.ours), {}, ""
    if (
        name == THEIRS
    ):  # its own defaults: logits of all tokens, a stream ends when the next request comes, a penalty
        told = ["--n_threads", str(args.threads), "--n_threads_batch", str(args.threads), "--n_ctx", "2048"]
        told += ["--logits_all", "False", "--interrupt_requests", "False", "--verbose", "False"]
        told = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), *here, *told]
        return told, {"repeat_penalty": 1.0}, ""
    if name == CPP:  # as many answers at once as ours, each with the same room
        told = [
            "-m",
            str(gguf),
            *here,
            "--threads",
            str(args.threads),
            "-c",
            str(16 * 2048),
            "--parallel",
            "16",
        ]
        return [*program_command(args.llama_server), *told, "--jinja"], {}, ""
    if name in EXPORTS:
        artifact = Artifact.load(run / "exports" / EXPORTS[name])
        told = [*other_command(artifact, args.vllm), *shlex.split(args.vllm_options), *here]
        return told, {}, artifact.name
    told = [
        str(Path(sys.executable).with_name("transformers")),
        "serve",
        str(merged),
        *here,
        "--device",
        "cpu",
    ]
    return told + ["--continuous-batching"] * (name == BATCH), {}, str(merged)


class Child:
    "A child process, started when it is first needed, with its peak memory."

    def __init__(self, name, args):
        self.name, self.args, self.process, self.error = name, args, None, ""
        self.peak = self.ready = 0.0

    def _start(self):
        port = free_port()
        told, self.fields, self.model = command(self.name, self.args, port)
        self.url, begun = f"http://127.0.0.1:{port}", time.perf_counter()
        # vLLM: an environment of its own, in the export's folder, from which its command names its files
        at = Path(self.args.run) / "exports" / EXPORTS[self.name] if self.name in EXPORTS else None
        path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), self.args.extra) if p and not at)
        env = os.environ | {"OMP_NUM_THREADS": str(self.args.threads), "PYTHONPATH": path}
        near = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.said = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            told, env=env, cwd=at, stdout=self.said, stderr=self.said, start_new_session=True
        )
        threading.Thread(target=self._watch, daemon=True).start()
        while time.perf_counter() - begun < self.args.start:
            if self.process.poll() is not None:
                break
            with suppress(OSError), near.open(self.url + "/v1/models", timeout=5):
                self.ready = time.perf_counter() - begun
                return
            time.sleep(0.1)
        self.said.seek(0)
        last = self.said.read().decode("utf-8", "replace").strip().splitlines()[-1:] or ["no word"]
        raise InputError(f"{self.name} did not start: {last[0][:200]}")

    def _watch(self):
        with suppress(psutil.Error):
            me = psutil.Process(self.process.pid)
            while self.process.poll() is None:
                family = [me, *me.children(recursive=True)]
                self.peak = max(self.peak, sum(p.memory_info().rss for p in family))
                time.sleep(0.2)

    def measure(self, clients):
        try:
            if self.error:
                raise InputError(self.error)
            if self.process is None:
                self._start()
                warm = {"requests": 2, "max_tokens": self.args.tokens, "timeout": 120.0}
                bench(self.url, self.args.prompts, (1,), model=self.model, extra=self.fields, **warm)
            more = {"max_tokens": self.args.tokens, "model": self.model, "extra": self.fields}
            length = self.args.seconds.get(clients, 12.0)
            found = bench(self.url, self.args.prompts, (clients,), seconds=length, **more)[0]
            return {"load": asdict(found), "ready": self.ready, "peak": self.peak}
        except (InputError, OSError) as error:
            self.error = str(error)
            return {"error": self.error}

    def stop(self):
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
        self.said.close()


def loop(args):  # in a process of its own: answers of `generate` until the time is over, as JSON on stdout
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    begun = time.perf_counter()
    folder = Path(args.run) / "exports/merged"
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ready, replies, at = time.perf_counter() - begun, [], 0

    def answer(numbers):
        texts = [
            tokenizer.apply_chat_template(args.prompts[i], tokenize=False, add_generation_prompt=True)
            for i in numbers
        ]
        given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(**given, do_sample=False, max_new_tokens=args.tokens)[
            :, given["input_ids"].shape[1] :
        ]
        return tokenizer.batch_decode(out, skip_special_tokens=True)

    answer([0])
    start = time.perf_counter()
    while (sent := time.perf_counter() - start) < args.seconds[16]:
        numbers = [(at + k) % len(args.prompts) for k in range(args.generate)]
        at += args.generate
        said, ended = answer(numbers), time.perf_counter() - start
        replies += [Reply(i, sent, sent, ended, ended, 200, t, "stop") for i, t in zip(numbers, said)]
    took = Load(args.generate, 0.0, time.perf_counter() - start, tuple(replies))
    peak = psutil.Process().memory_info().rss
    with suppress(ImportError, ValueError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"load": asdict(took), "ready": ready, "peak": peak}))


def looped(name, args):
    told = [sys.executable, __file__, "--run", str(args.run), "--generate", str(LOOPS[name])]
    told += ["--threads", str(args.threads)] + ["--quick"] * args.quick
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(told, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no word"])[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def parts(args):  # name of a part, what makes it: (round, server, level), in turns
    names = args.names
    for turn in range(args.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name in LOOPS:
                yield f"{turn} {name} {LOOPS[name]}", lambda name=name: looped(name, args)
                continue
            child = Child(name, args)
            try:
                for clients in args.levels:
                    yield f"{turn} {name} {clients}", lambda child=child, n=clients: child.measure(n)
            finally:
                child.stop()


def counted(told, tokenizer):  # a kept load, its tokens counted in one way for all servers
    rows = [Reply(**r) for r in told["load"]["replies"]]
    ids = tokenizer([r.text for r in rows], add_special_tokens=False)["input_ids"] if rows else []
    rows = [replace(r, tokens=len(i)) for r, i in zip(rows, ids)]
    usage = [
        r["pieces"] == r["tokens"] for r in told["load"]["replies"] if r["tokens"] is not None and r["reason"]
    ]
    return Load(**told["load"] | {"replies": tuple(rows)}), usage


def answers_of(loads):  # number of a prompt -> every whole answer to it
    said = {}
    for r in (r for x in loads for r in x.replies if r.ok):
        said.setdefault(r.prompt, []).append(r.text.strip())
    return said


def share(said, wanted):  # of answers that are as wanted, one a prompt and level
    hits = [text == wanted[i] for i, texts in said.items() if i in wanted for text in texts]
    return asdict(rate(hits, unit="answers")) if hits else None


def collected(results, args):
    tokenizer, rounds, told = load_tokenizer(Path(args.run) / "exports/merged"), {}, {}
    usage = {}
    for part, found in results.items():
        turn, rest = part.split(" ", 1)
        name, clients = rest.rsplit(" ", 1)
        if "error" in found:
            told.setdefault(name, {}).setdefault("errors", []).append(found["error"])
            continue
        made, same = counted(found, tokenizer)
        rounds.setdefault(name, {}).setdefault(int(clients), {})[int(turn)] = made
        usage.setdefault(name, []).extend(same)
        row = told.setdefault(name, {})
        row["ready_s"] = max(row.get("ready_s", 0.0), round(found["ready"], 2))
        row["peak_mb"] = max(row.get("peak_mb", 0), round(found["peak"] / 1e6))
    firsts = {name: {i: t[0] for i, t in answers_of(own(levels)).items()} for name, levels in rounds.items()}
    for name, levels in rounds.items():
        said, row = answers_of(own(levels)), told[name]
        row["levels"] = [summary(pooled(list(levels[n].values()))) for n in sorted(levels)]
        row["rounds"] = {
            n: [round(x.tokens_per_second, 2) for _, x in sorted(levels[n].items())] for n in levels
        }
        row["as_ours"], row["as_the_run"] = share(said, firsts.get(OURS, {})), share(said, args.wanted)
        row["pieces_as_usage"] = asdict(rate(usage[name], unit="answers")) if usage[name] else None
    return told, rounds


def own(levels):
    return [x for turns in levels.values() for x in turns.values()]


def goals(rounds):
    found = []
    for ours, theirs, clients, least in GOALS:
        a, b = rounds.get(ours, {}), rounds.get(theirs, {})
        a, b = a.get(clients, {}), b.get(clients) or (b.get(LOOPS[theirs], {}) if theirs in LOOPS else {})
        both = sorted(t for t in a.keys() & b.keys() if a[t].tokens and b[t].tokens)
        if both:
            ratio = speed_ratio(
                [a[t].tokens_per_second for t in both], [b[t].tokens_per_second for t in both]
            )
            made = {k: v if v != float("inf") else None for k, v in asdict(ratio).items()}
            found.append({"ours": ours, "theirs": theirs, "clients": clients, "goal": least, "ratio": made})
    return found


def versions():
    def of(package):
        with suppress(PackageNotFoundError):
            return version(package)

    names = ("ftnb", "llama_cpp_python", "xllamacpp", "transformers", "torch", "uvicorn", "fastapi")
    return {name: of(name) for name in names} | {"python": platform.python_version()}


def cpu():
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or "not known"


def shown(told, found):
    rows = {name: row["levels"] for name, row in told.items() if "levels" in row}
    lines = [
        load_table(rows),
        "",
        "| server | answers as ours | as the run's own | ready, s | peak MB | errors |",
    ]
    lines.append("| --- | --- | --- | ---: | ---: | --- |")
    for name, row in told.items():
        same = [
            f"{e['value']:.3f} (n = {e['n']})" if (e := row.get(k)) else "" for k in ("as_ours", "as_the_run")
        ]
        cells = [
            *same,
            row.get("ready_s", ""),
            row.get("peak_mb", ""),
            "; ".join(sorted(set(row.get("errors", [])))),
        ]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    lines += ["", "| this | beside | clients | times as many tokens/s | goal |"]
    lines.append("| --- | --- | ---: | --- | --- |")
    for g in found:
        r = g["ratio"]
        high = "?" if r["high"] is None else f"{r['high']:.2f}"
        lines.append(
            f"| {g['ours']} | {g['theirs']} | {g['clients']} "
            f"| {r['value']:.2f} ({r['low']:.2f} to {high}, n = {r['n']} rounds) | {g['goal']:g} |"
        )
    return "\n".join(lines)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--work", type=Path, help="where finished levels are kept; default: beside the temporary files"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--levels", default="1,4,16,64")
    parser.add_argument("--extra", default="", help="folder with the packages that llama_cpp.server needs")
    parser.add_argument("--ours", default="", help="more options for ftnb serve")
    parser.add_argument(
        "--llama-server", default="llama-server", help="the program; else the wheel xllamacpp"
    )
    parser.add_argument(
        "--vllm", default="vllm", help="the program, or its path; left out where it is not found"
    )
    parser.add_argument("--vllm-options", default="", help="more options for vLLM")
    parser.add_argument("--only", default="", help="names of servers, with ; between them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", type=float, default=180.0, help="seconds that a server may take to start")
    parser.add_argument("--budget", type=float, help="seconds after which no level is begun")
    parser.add_argument(
        "--quick", action="store_true", help="one round, levels of 1 and 4 clients, 3 seconds each"
    )
    parser.add_argument("--generate", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.levels = [int(n) for n in args.levels.split(",")]
    args.only = [n.strip() for n in args.only.split(";") if n.strip()]
    args.seconds = dict(SECONDS)
    if args.quick:
        args.rounds, args.levels, args.seconds = 1, [1, 4], dict.fromkeys((1, 4, 16, 64), 3.0)
    return args


def main():
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child is stopped, too
    recipe = Recipe.load(args.run / "recipe.json")
    rows = load_records(args.run / "splits/test.jsonl")
    args.prompts, args.tokens = [messages_for(r, recipe.system) for r in rows], recipe.max_new_tokens
    if args.generate:
        return loop(args)
    report = args.run / "reports/tuned.json"
    said = {p.id: p.output.strip() for p in Report.load(report).predictions} if report.is_file() else {}
    args.wanted = {i: said[r.id] for i, r in enumerate(rows) if r.id in said}
    work = (
        args.work
        or Path(tempfile.gettempdir()) / f"ftnb-serve-{args.run.resolve().name}{'-quick' * args.quick}"
    )
    work.mkdir(parents=True, exist_ok=True)
    args.names = [n for n in SYSTEMS if not args.only or n in args.only]
    if vllm := [n for n in args.names if n in EXPORTS]:
        try:
            program_command(args.vllm)
        except InputError as error:
            args.names, vllm = [n for n in args.names if n not in EXPORTS], []
            print(f"{', '.join(EXPORTS)}: left out: {error}", file=sys.stderr)
    results = gathered(parts(args), work, args.budget)
    told, rounds = collected(results, args)
    found = goals(rounds)
    about = {"cpu": cpu(), "threads": args.threads, "rounds": args.rounds, "versions": versions()}
    about |= {"prompts": len(rows), "max_tokens": args.tokens, "seconds": args.seconds, "quick": args.quick}
    about |= {"model": recipe.model, "ours": args.ours}
    if vllm:
        about |= {
            "vllm": args.vllm_options,
            "versions": about["versions"] | {"vllm": said_version(args.vllm)},
        }
    if args.out:
        write_text(args.out, json.dumps({"about": about, "servers": told, "goals": found}, indent=1) + "\n")
    print(shown(told, found))


if __name__ == "__main__":
    main()
