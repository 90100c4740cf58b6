"""Rows a second and peak memory of `ftnb.scale.audit_stream` from 62,500 to 1,000,000 rows on two processes.

    python benchmarks/audit_scale.py --data ../shared/data --out docs/audit_scale.json

The rows are made here, with a seed, from the training texts of Banking77: halves of two texts of one class, with
words exchanged. Defects are planted at known rates, so found, missed and false alarms are counted by row.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from ftnb.data import load, normalise
from ftnb.scale import audit_sketch, peak_memory, plan_stream, read_sketch, sketch_local

SIZES = (62_500, 125_000, 250_000, 500_000, 1_000_000)
RATES = {  # planted rows in 1,000
    "exact-duplicate": 10,
    "normalised-duplicate": 10,
    "near-duplicate": 20,
    "contradiction": 2,
    "encoding-damage": 3,
    "control-token": 2,
    "rejected": 1,
}
SIGNS = ("<|im_end|>", "</s>", "[INST]", "<|endoftext|>")


def _typo(text, rng):
    at = rng.choice([i for i, c in enumerate(text) if c.isalpha()])
    return (
        text[:at] + rng.choice([c for c in "abcdefghijklmnoprstu" if c != text[at].lower()]) + text[at + 1 :]
    )


class _Rows:
    "Texts that no earlier row has, up to case and punctuation; and earlier rows, each handed out once."

    def __init__(self, train, seed):
        self.rng, self.by_class, self.used, self.waiting = random.Random(seed), {}, set(), []
        for record in load(train).records:
            self.by_class.setdefault(record.label, []).append(record.text)
        self.labels = sorted(self.by_class)
        self.words = sorted({w for texts in self.by_class.values() for t in texts for w in t.split()})

    def new(self, made=None):
        while True:
            text, label = made() if made else self._joined()
            key = hash(normalise(text))
            if len(text) > 12 and key not in self.used:
                self.used.add(key)
                return text, label

    def _joined(self):
        rng, label = self.rng, self.rng.choice(self.labels)
        first, second = (rng.choice(self.by_class[label]).split() for _ in range(2))
        words = first[: len(first) // 2 + 1] + second[len(second) // 2 :]
        return " ".join(rng.choice(self.words) if rng.random() < 0.15 else w for w in words).strip(), label

    def keep(self, row):
        if len(self.waiting) < 20_000:
            self.waiting.append(row)
        elif self.rng.random() < 0.1:
            self.waiting[self.rng.randrange(len(self.waiting))] = row

    def earlier(self):
        at = self.rng.randrange(len(self.waiting))
        self.waiting[at], self.waiting[-1] = self.waiting[-1], self.waiting[at]
        return self.waiting.pop()

    def planted(self, kind):
        if kind in (None, "rejected"):
            return *self.new(), None
        if kind == "encoding-damage":
            text, label = self.new()
            return text + " cafÃ©", label, None
        if kind == "control-token":
            text, label = self.new()
            return text + self.rng.choice(SIGNS), label, None
        text, label, line = self.earlier()
        if kind == "normalised-duplicate":
            text = text.upper() if text != text.upper() else text.lower()
        if kind == "near-duplicate":
            text, label = self.new(lambda: (_typo(text, self.rng), label))
        if kind == "contradiction":
            label = self.rng.choice([name for name in self.labels if name != label])
        return text, label, line


def make_rows(path: Path, n: int, train: Path, seed: int = 0) -> dict[str, list[int]]:
    "Writes `n` lines and returns kind -> planted line numbers; for contradictions, both lines."
    rows, lines = _Rows(train, seed), {kind: [] for kind in RATES}
    kinds, weights = [*RATES, None], [*RATES.values(), 1000 - sum(RATES.values())]
    with path.open("w", encoding="utf-8") as file:
        for number in range(1, n + 1):
            kind = rows.rng.choices(kinds, weights)[0] if number > 500 else None
            text, label, earlier = rows.planted(kind)
            if kind is None:
                rows.keep((text, label, number))
            else:
                lines[kind] += [number, earlier] if kind == "contradiction" else [number]
            line = json.dumps({"text": text, "category": label}, ensure_ascii=False)
            file.write((line[: len(line) // 2] if kind == "rejected" else line) + "\n")
    return lines


def _timed(said, name, call):
    start = time.perf_counter()
    result = call()
    said[name] = round(time.perf_counter() - start, 2)
    return result


def measure(path: Path, folder: Path, planted: dict[str, list[int]], n: int) -> dict:
    "One audit in a fresh process: seconds of its parts, peak memory, and what it found of what was planted."
    said = {"rows": n, "megabytes": round(path.stat().st_size / 1e6, 1)}
    with peak_memory() as memory:
        plan = _timed(said, "plan_seconds", lambda: plan_stream(path, "classification", folder))
        _timed(said, "map_seconds", lambda: sketch_local(plan, 2))
        memory["map"] = memory["bytes"]
        memory["bytes"] = 0
        report = _timed(said, "reduce_seconds", lambda: audit_sketch(read_sketch(plan), limit=n))
    said["seconds"] = round(sum(said[f"{part}_seconds"] for part in ("plan", "map", "reduce")), 2)
    said["rows_per_second"] = round(n / said["seconds"])
    said["peak_megabytes_map"], said["peak_megabytes_reduce"] = (
        round(memory[k] / 1e6) for k in ("map", "bytes")
    )
    said["sketch_bytes_per_row"] = round(sum(p.stat().st_size for p in Path(plan.folder).iterdir()) / n)
    found = {i.kind: {int(name.split(":")[1]) for name in i.ids} for i in report}
    lost = [json.loads(line)["line"] for line in (Path(plan.folder) / "rejected.jsonl").open()]
    found["rejected"] = set(lost)
    said["planted"] = {
        kind: {
            "planted": len(set(lines)),
            "found": len(set(lines) & found.get(kind, set())),
            "also_flagged": len(found.get(kind, set()) - set(lines)),
        }
        for kind, lines in planted.items()
    }
    said["kinds"] = {i.kind: i.text[:160] for i in report}
    return said


def _in_new_process(call, *args):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *args).result()


def _growth(runs):
    rows, seconds = (np.array([run[k] for run in runs], float) for k in ("rows", "seconds"))
    if len(runs) < 2:
        return {}
    power = np.polyfit(np.log(rows), np.log(seconds), 1)[0]
    return {"growth": {"seconds_grow_as_rows_to_the_power": round(float(power), 3)}}


def main(data: Path, out: Path | None = None, sizes: tuple[int, ...] = SIZES) -> dict:
    "Makes, audits and counts each size; prints a table, writes `out` if given."
    train = Path(data) / "banking77" / "train.jsonl"
    result = {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
        "workers": 2,
        "planted_per_1000": RATES,
        "note": "also_flagged: rows that were not planted; near-duplicate also names the row that was edited, "
        "and made rows that are alike by chance",
        "runs": [],
    }
    print(
        f"{'rows':>10} {'seconds':>8} {'map':>7} {'reduce':>7} {'rows/s':>8} {'MB map':>7} {'MB reduce':>9}"
    )
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            planted = _in_new_process(make_rows, path, n, train)
            run = _in_new_process(measure, path, Path(folder), planted, n)
        result["runs"].append(run)
        numbers = (run[k] for k in ("seconds", "map_seconds", "reduce_seconds", "rows_per_second"))
        print(f"{n:>10,}", "{:8.1f} {:7.1f} {:7.1f} {:8,}".format(*numbers), end=" ")
        print(f"{run['peak_megabytes_map']:>7} {run['peak_megabytes_reduce']:>9}", flush=True)
    print(json.dumps(result["runs"][-1]["planted"], indent=1))
    result |= _growth(result["runs"])
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with banking77/")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rows", type=int, nargs="*", default=SIZES, help="sizes to run")
    options = parser.parse_args()
    if not (options.data / "banking77" / "train.jsonl").is_file():
        sys.exit(f"no banking77/train.jsonl in {options.data}")
    main(options.data, options.out, tuple(options.rows))
