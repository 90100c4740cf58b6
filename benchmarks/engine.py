"""Tokens a second of answers side by side: 1, 2, 4, 8, 16 and 32 at once in llama.cpp and in transformers.

    python benchmarks/engine.py --run runs/store [--out docs/engine.json] [--rounds 5] [--rows 32] [--quick]

RUN is a finished run with its exports. All levels of one engine take turns within a round;
answers are greedy and must be the same tokens at every level for Q8_0 (counted for the others). Rates count
answer tokens only, the time holds the reading of the prompts, too. Prints a Markdown table; --out writes JSON.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LEVELS = {kind: (1, 4, 16) for kind in ("gguf-q8_0", "adapter")}


def answers_of(batch, asked, slots: int) -> list:
    "All answers, at most `slots` of them under way."
    from ftnb.engine import Answer, Ask

    found = [Answer(Ask(tuple(ids), room), room) for ids, room in asked]
    line, batch.rows = [*found], []
    while line or batch.rows:
        while line and len(batch.rows) < slots:
            batch.rows.append(line.pop(0))
        batch.step()
        batch.rows = [a for a in batch.rows if a.reason is None]
    return found


def measure(engine, asked, levels, rounds: int) -> list[dict]:
    "Rates of each level with intervals of their ratio to one at once."
    from ftnb.engine import open_slots

    rates, same, first = {n: [] for n in levels}, {n: 0 for n in levels}, None
    for turn in range(rounds + 1):  # the first warms up
        for slots in levels if turn % 2 else levels[::-1]:
            batch = open_slots(engine, slots)
            answers_of(
                batch, [(ids, 1) for ids, _ in asked[:slots]], slots
            )  # as a server that has been up for a while
            begun = time.perf_counter()
            found = answers_of(batch, asked, slots)
            took = time.perf_counter() - begun
            batch.close()
            ids = [tuple(a.ids) for a in found]
            first = first or ids
            same[slots] = sum(a == b for a, b in zip(ids, first, strict=True))
            if turn:
                rates[slots].append(sum(map(len, ids)) / took)
            print(
                f"  round {turn}, {slots} at once: {sum(map(len, ids)) / took:.0f} tokens/s", file=sys.stderr
            )
    rows = []
    for slots in levels:
        ratio = np.log(np.array(rates[slots]) / np.array(rates[levels[0]]))
        half = 0.0
        if rounds > 1:
            from scipy.stats import t

            half = t.ppf(0.975, rounds - 1) * ratio.std(ddof=1) / rounds**0.5
        middle = ratio.mean()
        row = {"slots": slots, "rate": float(np.median(rates[slots])), "ratio": float(np.exp(middle))}
        rows.append(
            row
            | {"low": float(np.exp(middle - half)), "high": float(np.exp(middle + half)), "same": same[slots]}
        )
    return rows


def processor() -> str:
    "Its features that matter here, since cloud machines hide the name."
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    wanted = [f for f in ("amx_int8", "avx512_vnni", "avx512f", "avx2") if f in flags]
    return f"{len(os.sched_getaffinity(0))} cores of {platform.machine()} with {wanted[0] if wanted else 'no vector unit known'}"


def main() -> int:
    "Exit code 1 when Q8_0 gives other tokens at another level."
    from ftnb.deploy import Artifact
    from ftnb.engine import load_for_generation
    from ftnb.plan import write_text
    from ftnb.train import Run

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    rounds, rows = (1, 8) if given.quick else (given.rounds, given.rows)
    run, engines = Run.load(given.run), []
    for kind, levels in LEVELS.items():
        engine = load_for_generation(Artifact.load(Path(given.run) / "exports" / kind))
        asked = [
            (engine.prompt(r.messages, r.tools), run.recipe.max_new_tokens) for r in run.splits.test[:rows]
        ]
        print(kind, file=sys.stderr)
        engines.append({"name": kind, "levels": measure(engine, asked, levels, rounds)})
        engine.close()
    made = {
        "n": rows,
        "rounds": rounds,
        "machine": processor(),
        "model": run.recipe.model,
        "engines": engines,
    }
    print("| engine | " + " | ".join(f"{n} at once" for n in LEVELS["adapter"]) + " |")
    print("| --- " * (len(LEVELS["adapter"]) + 1) + "|")
    for e in engines:
        print(
            f"| {e['name']} | "
            + " | ".join(f"{v['rate']:.0f} ({v['ratio']:.2f})" for v in e["levels"])
            + " |"
        )
    if given.out:
        write_text(given.out, json.dumps(made, indent=1) + "\n")
    return 0 if all(v["same"] == rows for v in engines[0]["levels"]) else 1


if __name__ == "__main__":
    sys.exit(main())
