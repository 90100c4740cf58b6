"""Six ways to do the store assistant's job, and how two of them take other wordings: what `ftnb.decide` decides from.

    python benchmarks/decide.py --run RUN [--out FILE] [--work DIR] [--n ROWS] [--reworded ROWS] [--budget SECONDS]

RUN is the folder of a finished run: `make run` leaves runs/store. Two cores are enough: about 10 minutes, in parts.
Answers are kept in --work as they come, so a run that was stopped, or that stopped at --budget, goes on where it was.
Prints Markdown tables; --out writes answers, token counts, seconds and consistency as JSON, which the notebooks read.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from ftnb.baselines import SYSTEMS, baselines, load_baselines, save_baselines
from ftnb.decide import REPHRASINGS, asker, consistency
from ftnb.evaluate import few_shots, task_prompt
from ftnb.model import load_model, load_tokenizer
from ftnb.plan import write_text
from ftnb.sweep import subset
from ftnb.train import Run, load_run

REWORDED = ("few-shot", "tuned")


def loaders(run):
    "Each model is loaded once, and only if an answer is missing."
    held = {}

    def base():
        if "base" not in held:
            recipe = run.recipe
            model = load_model(recipe.model, "float32", recipe.method, recipe.revision).eval()
            held["base"] = model, load_tokenizer(recipe.model, recipe.template, recipe.revision)
        return held["base"]

    def tuned():
        if "tuned" not in held:
            held["tuned"] = load_run(run)
        return held["tuned"]

    return base, tuned


def remembered(load, recipe, path):
    "Answers of a model, each kept on disk under the hash of its prompt."
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}

    def answer(records, system, shots):
        told = [
            json.dumps([r.messages, system, [s.id for s in shots], recipe.max_new_tokens]) for r in records
        ]
        keys = [hashlib.sha256(t.encode()).hexdigest()[:20] for t in told]
        left = [k for k, key in enumerate(keys) if key not in kept]
        for start in range(0, len(left), 32):
            part = left[start : start + 32]
            said = asker(*load(), recipe)([records[k] for k in part], system, shots)
            kept.update({keys[k]: text for k, text in zip(part, said)})
            write_text(path, json.dumps(kept))
        return [kept[key] for key in keys]

    return answer


def reworded(run, base, tuned, args):
    "The same questions in other words: with fixed examples to the base model, and to the tuned model."
    recipe, own = run.recipe, run.splits.own
    asked = subset(run.splits.test, args.reworded, recipe.seed)
    ways = {
        "few-shot": (
            base,
            task_prompt(own, recipe.task) or recipe.system,
            few_shots(own, recipe.shots, recipe.seed),
        ),
        "tuned": (tuned, recipe.system, ()),
    }
    found = {}
    for name in REWORDED:
        load, system, shots = ways[name]
        answer = remembered(load, recipe, args.work / f"reworded-{name}.json")
        found[name] = consistency(answer, asked, system, shots)
        kept = [c for c in REPHRASINGS if c.system]  # answers are at hand: nothing is asked again
        found[f"{name}, its prompt kept"] = consistency(answer, asked, system, shots, kept)
        print(f"\n{name}, {len(asked)} rows\n\n{found[name]._repr_markdown_()}", flush=True)
    return found


def identity(run):
    "Changes when the run's weights do; no model is loaded for it."
    files = sorted(run.adapter_dir.glob("*.safetensors"))
    seen = hashlib.sha256("".join(hashlib.sha256(f.read_bytes()).hexdigest() for f in files).encode())
    return f"{run.recipe.model} {run.recipe.revision} {seen.hexdigest()[:16]}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--n", type=int, default=0, help="test rows for the six systems; 0 = all")
    parser.add_argument("--reworded", type=int, default=48, help="test rows that are asked in other words")
    parser.add_argument(
        "--budget", type=float, default=0, help="stop between two systems after so many seconds"
    )
    args = parser.parse_args()
    args.work = args.work or args.run / "decide"
    args.work.mkdir(parents=True, exist_ok=True)
    began, run = time.monotonic(), Run.load(args.run)
    base, tuned = loaders(run)
    for name in SYSTEMS:  # one at a time, so that a budget can stop in between
        told = {"out": args.work, "n": args.n, "leaked": run.leaked, "key": identity(run)}
        baselines(run.recipe, run.splits, base, tuned, systems=[name], **told)
        if args.budget and time.monotonic() - began > args.budget:
            print(f"stopped after {name}; the same command goes on", file=sys.stderr)
            return
    found = baselines(run.recipe, run.splits, base, tuned, **told)
    print(found._repr_markdown_())
    for line in found.compare("tuned"):
        print(f"\n{line}", end="")
    print("\n\n| system | requests a second |\n| --- | --- |")
    for s in found:
        print(f"| {s.title} | {s.report.n / s.seconds:.2f} |")
    words = reworded(run, base, tuned, args)
    print(f"\n{time.monotonic() - began:.0f} s, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    if args.out:
        save_baselines(found, args.out, text=False)
        table = json.loads(args.out.read_text("utf-8"))
        table["reworded"] = {name: asdict(c) for name, c in words.items()}
        table["made"] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        write_text(args.out, json.dumps(table, ensure_ascii=False) + "\n")
        assert len(load_baselines(args.out)) == len(found)


if __name__ == "__main__":
    main()
