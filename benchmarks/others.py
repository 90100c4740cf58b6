"""Servers of others on a finished run's exports: are the prompts those of training, and the answers those of the run?

    python benchmarks/others.py RUN [--out FILE] [--work DIR] [--rows 168] [--asks 40] [--llama-server PATH]
        [--vllm PATH] [--exports DIR] [--only NAMES]

RUN is a finished run. Each export that is missing is made into --exports. Every server is started by the command of the
export's SERVE.md, asked for the tokens of all test rows and of eight odd messages, and asked for the answers to the first
--asks rows whose answer the run itself ended. `llama-server` is the program of that name, or the server in the wheel
xllamacpp; `vllm` may lie in an environment of its own. What is not found is left out, and said. Finished parts are kept
in --work. Prints a Markdown table; --out writes the numbers as JSON.
"""

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from parts import gathered, said_version

from ftnb.deploy import Artifact, export
from ftnb.endpoint import check_endpoint, golden_prompts, other_server, program_command
from ftnb.evaluate import Report
from ftnb.model import load_tokenizer
from ftnb.plan import InputError, cache_dir, write_text
from ftnb.train import Run

# a share of memory; no compiler before the first answer
SMALL = ("--gpu-memory-utilization", "0.3", "--enforce-eager")
FIRST = "vLLM, adapter, asked for the first name it lists"
TOGETHER = (  # name, program, export, further options
    ("ftnb serve", "ftnb", "gguf-q8_0", ()),
    ("llama-server", "llama-server", "gguf-q8_0", ()),
    ("llama-server, adapter", "llama-server", "gguf-lora", ()),
    ("vLLM", "vllm", "merged", SMALL),
    ("vLLM, adapter", "vllm", "adapter", SMALL),
    (FIRST, "vllm", "adapter", SMALL),
)


def checked(args, program, kind, more, model):
    golden = golden_prompts(args.tokenizer, list(args.run.splits.test), args.run.recipe.system, args.rows)
    answers = dict([(g["id"], args.known[g["id"]]) for g in golden if g["id"] in args.known][: args.asks])
    begun = time.perf_counter()
    with other_server(args.exports / kind, program, more, seconds=600) as url:
        ready = time.perf_counter() - begun
        limit = args.run.recipe.max_new_tokens
        found = check_endpoint(url, args.tokenizer, golden, answers, model, max_tokens=limit)
    told = {"kind": found.kind, "n": found.n, "equal": found.n - len(found.drifts), "asked": found.asked}
    told |= {"causes": Counter(d.cause for d in found.drifts), "first": [asdict(d) for d in found.drifts[:3]]}
    told |= {"endless": len(found.endless), "same": asdict(found.same) if found.same else None}
    return {"export": kind, "version": said_version(program), "ready_s": round(ready, 1)} | told


def parts(args):
    programs = {"ftnb": "ftnb", "llama-server": args.llama_server, "vllm": args.vllm}
    for name, program, kind, more in TOGETHER:
        at = programs[program]
        if args.only and name not in args.only:
            continue
        try:
            program_command(at)
        except InputError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        if not (args.exports / kind / "manifest.json").is_file():
            export(args.run, args.exports, (kind,))
        own = "" if name == FIRST else Artifact.load(args.exports / kind).name
        yield name, lambda at=at, kind=kind, more=more, own=own: checked(args, at, kind, more, own)


def shown(results):
    lines = [
        "| server | export | version | prompts equal | what differs | answers end | as the run's own | ready, s |"
    ]
    lines.append("| --- | --- | --- | ---: | --- | ---: | --- | ---: |")
    for name, r in results.items():
        causes = "; ".join(f"{n}: {cause}" for cause, n in r["causes"].items())
        same = (
            r["same"]
            and f"{r['same']['value']:.1%} ({r['same']['low']:.1%} to {r['same']['high']:.1%}, n = {r['same']['n']})"
        )
        ends = f"{r['asked'] - r['endless']} of {r['asked']}"
        cells = [
            name,
            r["export"],
            r["version"],
            f"{r['equal']} of {r['n']}",
            causes,
            ends,
            same or "",
            r["ready_s"],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--work", type=Path, help="folder for finished parts")
    parser.add_argument("--exports", type=Path, help="folder of exports; without it that of the run")
    parser.add_argument("--rows", type=int, default=168, help="test rows whose prompts are compared")
    parser.add_argument("--asks", type=int, default=40, help="prompts that are answered")
    parser.add_argument("--llama-server", default="llama-server", help="the program, or its path")
    parser.add_argument("--vllm", default="vllm", help="the program, or its path")
    parser.add_argument("--only", default="", help="names of servers, with ; between them")
    args = parser.parse_args()
    args.only = [name.strip() for name in args.only.split(";") if name.strip()]
    args.exports, args.run = args.exports or args.run / "exports", Run.load(args.run)
    args.tokenizer = load_tokenizer(args.run.adapter_dir)
    tuned = Report.load(args.run.dir / "reports/tuned.json")
    args.known = {p.id: p.output for p in tuned.predictions if p.stopped}
    args.work = args.work or cache_dir() / "others" / args.run.dir.name
    args.work.mkdir(parents=True, exist_ok=True)
    results = gathered(parts(args), args.work)
    if args.out:
        about = {"model": args.run.recipe.model, "method": args.run.recipe.method, "rows": args.rows}
        write_text(args.out, json.dumps({"about": about, "servers": results}, indent=1) + "\n")
    print(shown(results))


if __name__ == "__main__":
    main()
