"""How often a slice that is not there is confirmed, how often a planted one is found, and what a large page costs.

    python benchmarks/failures.py [--section false|power|real|page] [--data DIR] [--trials N] [--out FILE]

Rows are the test rows of Banking77; in the first two sections their answers go wrong by chance. Prints Markdown tables;
--out writes the same numbers as JSON. Without --section all sections run.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from ftnb.data import group_near, load
from ftnb.evaluate import Prediction, baseline_tfidf, frame_hit, rate
from ftnb.failures import failure_clusters, failure_steps, find_slices, slice_p, traits, words_of, write_page


def rows_of(data, train=3000):
    "Training rows, test rows grouped by wording, and their traits."
    seen, asked = (list(load(data / f"banking77/{side}.jsonl").records) for side in ("train", "test"))
    asked, seen = (
        group_near(asked),
        [seen[i] for i in np.random.default_rng(0).permutation(len(seen))[:train]],
    )
    right = [Prediction(r.id, r.text, r.completion, r.completion, r.label, group=r.group) for r in asked]
    return seen, asked, right, traits(right, asked, seen)


def strewn(rows, chance, rng):
    return [
        replace(p, output="no such" if b else p.expected)
        for p, b in zip(rows, rng.random(len(rows)) < chance)
    ]


def some(right, table, n, rng):
    at = np.sort(rng.permutation(len(right))[:n])
    return [right[i] for i in at], table.iloc[at]


def false_slices(made, trials):
    "Answers go wrong at random, row by row or group by group: every confirmed slice is a false one."
    _, _, right, table = made
    print(
        "\n| rows | wrong | by | false slice confirmed | worst slice, tested where it was found, p < 0.05 |"
    )
    print("| ---: | ---: | --- | --- | --- |")
    told = []
    for n, share, by in ((200, 0.2, "row"), (1000, 0.08, "row"), (1000, 0.2, "row"), (1000, 0.2, "group")):
        rng, found, naive = np.random.default_rng(0), [], []
        for _ in range(trials):
            rows, part = some(right, table, n, rng)
            if by == "group":
                bad = {g: rng.random() < share for g in {p.group for p in rows}}
                rows = [replace(p, output="no such" if bad[p.group] else p.expected) for p in rows]
            else:
                rows = strewn(rows, share, rng)
            found.append(bool(find_slices(rows, part).confirmed))
            naive.append(worst_p(rows, part) < 0.05)
        made_of = {
            "rows": n,
            "wrong": share,
            "by": by,
            "false": str(rate(found, "trials")),
            "naive": str(rate(naive, "trials")),
        }
        print("| " + " | ".join(map(str, made_of.values())) + " |", flush=True)
        told.append(made_of)
    return told


def worst_p(rows, table):
    "The smallest p of the classes and common words, with nothing held out and nothing adjusted."
    wrong, said = np.array([not frame_hit(p) for p in rows]), [set(words_of(p.text)) for p in rows]
    slices = [np.array([c == k for c in table["class"]]) for k in set(table["class"])]
    words = {w for s in said for w in s}
    slices += [np.array([w in s for s in said]) for w in words if sum(w in s for s in said) >= 10]
    return min(slice_p(wrong, s) for s in slices if s.sum() >= 10) if slices else 1.0


def power(made, trials):
    "One slice is planted; found where most rows of a confirmed slice and of the planted one are the same."
    _, _, right, table = made
    print("\n| rows | planted slice | its rows | wrong in it, elsewhere | found |")
    print("| ---: | --- | ---: | --- | --- |")
    told = []
    cases = [
        ("says “card”", lambda p: "card" in words_of(p.text)),
        ("8 words or fewer", lambda p: len(words_of(p.text)) <= 8),
    ]
    cases.append(("says “refund”", lambda p: "refund" in words_of(p.text)))
    for n in (500, 1000, 3080):
        for name, planted in cases:
            for share in (0.2, 0.4):
                rng, hits, sizes = np.random.default_rng(0), [], []
                for _ in range(trials):
                    rows, part = some(right, table, n, rng)
                    inside = np.array([planted(p) for p in rows])
                    rows = strewn(rows, np.where(inside, share, 0.08), rng)
                    real = {p.id for p, i in zip(rows, inside) if i}
                    found = [set(s.ids) for s in find_slices(rows, part).confirmed]
                    hits.append(any(len(real & f) > 0.5 * len(real | f) for f in found))
                    sizes.append(len(real))
                made_of = {
                    "rows": n,
                    "planted": name,
                    "its": round(np.mean(sizes)),
                    "wrong": f"{share:.0%}, 8%",
                }
                made_of["found"] = str(rate(hits, "trials"))
                print("| " + " | ".join(map(str, made_of.values())) + " |", flush=True)
                told.append(made_of)
    return told


def real(made, _):
    "TF-IDF on part of the training rows: its slices, its clusters, and what they call for."
    seen, asked, _, table = made
    answers = baseline_tfidf(seen, asked)
    began = time.perf_counter()
    found, clusters = find_slices(answers, table), failure_clusters(answers)
    took = time.perf_counter() - began
    print(f"\n{found._repr_markdown_()}\n\n{clusters._repr_markdown_()}\n")
    steps = failure_steps(found, clusters)
    print("\n".join(f"- {step}" for step in steps))
    print(f"\nslices and clusters of {len(answers):,} rows took {took:.1f} s")
    return {
        "slices": [str(s) for s in found],
        "clusters": [str(c) for c in clusters],
        "steps": steps,
        "seconds": took,
    }


def page(made, _):
    "10,000 rows of three systems: size, time to write, and time to filter them in a browser."
    _, asked, right, _ = made
    rng, many, records = np.random.default_rng(0), [], []
    for k in range(4):
        many += [replace(p, id=f"{k}-{p.id}") for p in right]
        records += [replace(r, id=f"{k}-{r.id}") for r in asked]
    many, records = many[:10_000], records[:10_000]
    systems = {
        name: strewn(many, share, rng) for name, share in (("base", 0.6), ("few-shot", 0.4), ("tuned", 0.1))
    }
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        path = write_page(Path(folder) / "page.html", systems, records)
        told = {
            "rows": len(many),
            "MB": round(path.stat().st_size / 1e6, 2),
            "seconds to write": round(time.perf_counter() - began, 2),
        }
        told |= in_browser(path)
    print(
        "\n| "
        + " | ".join(told)
        + " |\n|"
        + " ---: |" * len(told)
        + "\n| "
        + " | ".join(map(str, told.values()))
        + " |"
    )
    return told


def in_browser(path):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        return {"browser": "none here"}
    timed = "(work) => { const t = performance.now(); document.querySelector(work).click(); return performance.now() - t }"
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab, began = browser.new_page(), time.perf_counter()
        tab.goto(path.as_uri())
        tab.wait_for_selector("article")
        opened = time.perf_counter() - began
        clear = sorted(tab.evaluate(timed, "#clear") for _ in range(5))[2]
        label = sorted(tab.evaluate(timed, "[data-label=right]") for _ in range(5))[2]
        browser.close()
    return {
        "seconds to open": round(opened, 2),
        "ms to filter": round(clear, 1),
        "ms to label": round(label, 1),
    }


SECTIONS = {"false": false_slices, "power": power, "real": real, "page": page}


def main(data: Path, out: Path | None = None, sections=tuple(SECTIONS), trials: int = 200) -> dict:
    "Runs the sections, prints their tables, writes all numbers to `out`."
    made, result = rows_of(data), {}
    for name in sections:
        print(f"\n## {name}: {SECTIONS[name].__doc__.splitlines()[0]}")
        result[name] = SECTIONS[name](made, trials)
    if out:
        Path(out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--section", choices=SECTIONS, help="one section; without it all")
    shared = os.environ.get("FTNB_SHARED") or Path(__file__).resolve().parents[2] / "shared"
    parser.add_argument("--data", type=Path, default=Path(shared) / "data", help="folder with banking77/")
    parser.add_argument(
        "--trials", type=int, default=200, help="trials of each line in the first two sections"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    main(options.data, options.out, [options.section] if options.section else tuple(SECTIONS), options.trials)
