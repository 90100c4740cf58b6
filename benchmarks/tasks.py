"""The recipes for real data sets, trained and tested on the official splits, with what they cost.

    python benchmarks/tasks.py [--data DIR] [--work DIR] [--out FILE] [--tasks banking77,snips]

On two cores about an hour for each task. Runs are kept in --work, so one that was stopped goes on where it was, and a
finished one is only read. Prints a Markdown table; --out writes the same numbers as JSON. DIR holds banking77/ and
snips/, each with train.jsonl and test.jsonl.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from ftnb.cli import comparisons_of
from ftnb.evaluate import Report
from ftnb.plan import Recipe, cache_dir, write_text
from ftnb.train import Run

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "import sys; from ftnb.cli import main; sys.exit(main())"
SHOWN = ("accuracy", "macro_f1", "frame_match", "intent_accuracy", "slot_f1", "json_validity")


def timed(name, words, spent, done):
    "Run one command of ftnb, and add what it cost to the file `spent`, however it ends."
    kept = json.loads(spent.read_text("utf-8")) if spent.exists() else {}
    if done.exists() and name in kept:
        return kept
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    code = subprocess.run([sys.executable, "-c", COMMAND, *map(str, words)]).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    was = kept.get(name, {"cpu_seconds": 0.0, "seconds": 0.0})
    kept[name] = {
        "cpu_seconds": round(was["cpu_seconds"] + used, 1),
        "seconds": round(was["seconds"] + time.perf_counter() - start, 1),
    }
    write_text(spent, json.dumps(kept, indent=1))
    if code:
        raise SystemExit(code)
    return kept


def numbers(metrics):
    return {
        name: {"value": m.value, "n": m.n, "low": m.low, "high": m.high, "unit": m.unit, "method": m.method}
        for name, m in metrics.items()
        if name in SHOWN
    }


def task(name, args):
    recipe, rows, folder = ROOT / "recipes" / f"{name}.toml", args.data / name, args.work / name
    spent = args.work / f"{name}-cost.json"
    files = ["--data", rows / "train.jsonl", "--test-data", rows / "test.jsonl", "--allow-leakage"]
    words = ["train", "--recipe", recipe, *files, "--out", folder]
    timed("train", words, spent, folder / "run.json")
    reports = [folder / "reports" / f"{system}.json" for system in args.systems]
    words = ["evaluate", folder, "--systems", ",".join(args.systems)]
    cost = timed("evaluate", words, spent, reports[-1])
    run = Run.load(folder)
    found = {"recipe": {k: v for k, v in vars(run.recipe).items() if v != getattr(Recipe(), k)}}
    found |= {"cost": cost, "best_step": run.best_step, "steps": run.metrics["steps"]}
    found |= {
        k: run.metrics[k] for k in ("n_train", "dtype", "trainable", "eval_loss", "eval_match", "eval_n")
    }
    loaded = [Report.load(path) for path in reports]
    found["compared"] = [str(c) for c in comparisons_of(loaded)]
    for report in loaded:
        found.setdefault("systems", {})[report.system] = {
            "all": numbers(report.metrics),
            "without leaked": numbers(report.unseen),
            "leaked": len(report.leaked),
        }
    return found


def main(args):
    args.work.mkdir(parents=True, exist_ok=True)
    made = {name: task(name, args) for name in args.tasks.split(",")}
    print(
        "| task | system | metric | value | n | 95 % interval | without leaked rows |\n|--|--|--|--|--|--|--|"
    )
    for name, found in made.items():
        for system, scores in found["systems"].items():
            for metric, m in scores["all"].items():
                less = scores["without leaked"].get(metric)
                shown = f"{less['value']:.1%} (n = {less['n']:,})" if less else "-"
                span = f"{m['low']:.1%} to {m['high']:.1%}"
                print(f"| {name} | {system} | {metric} | {m['value']:.1%} | {m['n']:,} | {span} | {shown} |")
        minutes = {k: v["cpu_seconds"] / 60 for k, v in found["cost"].items()}
        print("\n" + "\n".join(found["compared"]))
        print(f"\n{name}: CPU minutes {', '.join(f'{k} {v:.0f}' for k, v in minutes.items())}\n")
    if args.out:
        old = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
        write_text(args.out, json.dumps(old | made, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with banking77/, snips/"
    )
    parser.add_argument("--work", type=Path, default=cache_dir() / "tasks", help="where runs are kept")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--tasks", default="banking77", help="names of recipes, separated by commas")
    parser.add_argument("--systems", type=lambda s: s.split(","), default=["tuned", "tfidf"], help="to ask")
    main(parser.parse_args())
