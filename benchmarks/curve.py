"""Does a learning curve's interval hold what more rows then brought? Sub-samplings of Banking77, TF-IDF + logistic regression.

    python benchmarks/curve.py [--data DIR] [--out FILE] [--points DIR] [--rows 1600] [--times 40]

Each sub-sampling draws n training rows and 1,000 test rows. A curve is fitted on up to n/2 rows, another on up to
n/4, and the score after training on all n is held against the forecasts: on the same test rows, and on the other ones,
which no fit has seen. Beside the power law with its doubt about the form stand the power law alone, a line that is
straight in log rows, and "it stays as it is".
--points keeps finished trainings, so that an interrupted run goes on. The learner is cheap, which is what makes forty
sub-samplings of some forty trainings possible; the curve of a tuned language model begins higher and bends elsewhere, so
the counts say how far the intervals can be trusted, not where such a model's curve goes.
"""

import argparse
import json
import os
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression

from ftnb.curve import FORMS, SHARES, fit_curve, fractions, learning_curve
from ftnb.data import group_near, load
from ftnb.evaluate import Prediction, baseline_tfidf, wilson
from ftnb.plan import progress

ASKED = 1000  # test rows of a curve
BACK = {"n/2": 2, "n/4": 4}


class Counted:
    "`baseline_tfidf`, answer for answer, with the n-grams of all texts counted once."

    __name__ = "baseline_tfidf"

    def __init__(self, records):
        self.at = {r.id: i for i, r in enumerate(records)}
        words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\w+", dtype=np.float64)
        parts = CountVectorizer(analyzer="char_wb", ngram_range=(2, 5), dtype=np.float64)
        self.counts = [v.fit_transform([r.text for r in records]).tocsr() for v in (words, parts)]

    def __call__(self, train, test):
        rows, asked = ([self.at[r.id] for r in side] for side in (train, test))
        seen, new = [], []
        for counts in self.counts:
            known = np.unique(counts[rows].indices)  # an n-gram that training lacks is no feature
            scaled = TfidfTransformer(sublinear_tf=True).fit(counts[rows][:, known])
            seen.append(scaled.transform(counts[rows][:, known]))
            new.append(scaled.transform(counts[asked][:, known]))
        model = LogisticRegression(C=10.0, max_iter=2000).fit(
            sp.hstack(seen).tocsr(), [r.label for r in train]
        )
        answers = model.predict(sp.hstack(new).tocsr())
        return [Prediction(r.id, r.text, r.label, str(a), r.label) for r, a in zip(test, answers)]


def banking(data: Path):
    "Training rows that are like no test row, and test rows; groups of near-identical wordings over both."
    train, test = (load(data / f"banking77/{side}.jsonl").records for side in ("train", "test"))
    test = [replace(r, id=f"test:{r.id}") for r in test]
    rows = group_near([*train, *test])
    train, test = rows[: len(train)], rows[len(train) :]
    held = {r.group for r in test}
    return [r for r in train if r.group not in held], test


def sub_sampling(train, test, n, seed, learner, points):
    "The two curves, and what was right after all n rows: on the curves' test rows, and on the others."
    whole = fractions(train, (n / len(train),), seed)[0]
    names = sorted({r.group for r in test})
    random.Random(seed).shuffle(names)
    place = {name: i for i, name in enumerate(names)}
    ordered = sorted(test, key=lambda r: (place[r.group], r.id))  # groups stay whole
    end = next(i for i in range(ASKED, len(ordered)) if ordered[i].group != ordered[i - 1].group)
    asked, others = ordered[:end], ordered[end:]
    curves, part = {}, whole
    for name in BACK:
        part = fractions(part, (0.5,), seed)[0]
        shares = [x for x in SHARES if x * len(part) >= 1.2 * len({r.label for r in part})]
        curves[name] = learning_curve(part, asked, learner, shares, out=points)
    reached = {}
    for name, rows in (("same", asked), ("other", others)):
        one = learning_curve(whole, rows, learner, (1.0,), out=points)
        reached[name] = float(one.right[0, 0].mean())
    return curves, reached, len(whole)


def judged(curves, reached, n):
    "One line for each curve, form and kind of test rows."
    lines = []
    for back, curve in curves.items():
        for form in (*FORMS, "power law alone"):
            fit = fit_curve(curve, form.removesuffix(" alone"), alone=form.endswith(" alone"))
            f = fit.forecast(n)
            for rows, value in reached.items():
                line = {"fitted on": back, "form": form, "test rows": rows, "rows": int(curve.sizes.max())}
                line |= {
                    "n": n,
                    "last": float(curve.right[:, -1].mean()),
                    "reached": value,
                    "forecast": f.value,
                }
                line |= {"low": f.low, "high": f.high, "low95": f.low95, "high95": f.high95}
                lines.append({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()})
    return lines


def summary(lines):
    "Coverage with its Wilson interval, the error of the forecast, and the width, for each kind of line."
    found = []
    for key in sorted({(x["fitted on"], x["form"], x["test rows"]) for x in lines}, key=str):
        some = [x for x in lines if (x["fitted on"], x["form"], x["test rows"]) == key]
        row = dict(zip(("fitted on", "form", "test rows"), key)) | {"sub-samplings": len(some)}
        for name, low, high in (("80%", "low", "high"), ("95%", "low95", "high95")):
            held = sum(x[low] <= x["reached"] <= x[high] for x in some)
            row |= {f"in {name}": held, f"in {name}, share": round(held / len(some), 3)}
            row[f"in {name}, interval"] = [round(float(e), 3) for e in wilson(held, len(some))]
        error = [100 * (x["forecast"] - x["reached"]) for x in some]
        row |= {
            "median error": round(float(np.median(np.abs(error))), 2),
            "mean error": round(float(np.mean(error)), 2),
        }
        row["median width of 80%"] = round(100 * float(np.median([x["high"] - x["low"] for x in some])), 2)
        missed = [max(x["low"] - x["reached"], x["reached"] - x["high"], 0) for x in some]
        scores = [x["high"] - x["low"] + 10 * m for x, m in zip(some, missed)]
        found.append(row | {"interval score": round(100 * float(np.mean(scores)), 2)})
    return found


def show(found):
    "The summary as a Markdown table."
    print(
        "\n| fitted on | form | test rows | in 80% | in 95% | median error | mean error | width of 80% | interval score |"
    )
    print("| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: |")
    for r in found:
        ends = ["{:.0%} to {:.0%}".format(*r[f"in {name}, interval"]) for name in ("80%", "95%")]
        held = [f"{r[f'in {name}']} of {r['sub-samplings']} ({e})" for name, e in zip(("80%", "95%"), ends)]
        numbers = [
            r["median error"],
            f"{r['mean error']:+.2f}",
            r["median width of 80%"],
            r["interval score"],
        ]
        print(f"| {' | '.join(map(str, [r['fitted on'], r['form'], r['test rows'], *held, *numbers]))} |")
    print(
        "\nErrors, widths and the interval score (width + 10 x what it misses by; lower is better) in points."
    )


def main(
    data: Path, out: Path | None = None, points: Path | None = None, n: int = 1600, times: int = 40
) -> dict:
    "Runs the sub-samplings, prints the table, writes all numbers to `out`."
    train, test = banking(data)
    learner, lines = Counted([*train, *test]), []
    sample = fractions(train, (0.05,), 0)[0]
    pairs = zip(baseline_tfidf(sample, test), learner(sample, test))
    same = sum(a.answered == b.answered for a, b in pairs)
    print(
        f"{len(train):,} training and {len(test):,} test rows; {same:,} of {len(test):,} answers are those of baseline_tfidf"
    )
    for seed in progress(range(times), "sub-samplings"):
        lines += judged(*sub_sampling(train, test, n, seed, learner, points))
        print(f"sub-sampling {seed}", file=sys.stderr, flush=True)
    found = summary(lines)
    show(found)
    kinds = Counter(r.label for r in train)
    result = {"data": "banking77", "learner": "TF-IDF + logistic regression", "training rows": len(train)}
    result |= {"test rows": len(test), "classes": len(kinds), "n": n, "same answers as baseline_tfidf": same}
    result |= {"summary": found, "sub-samplings": lines}
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FTNB_SHARED") or Path(__file__).resolve().parents[2] / "shared"
    parser.add_argument("--data", type=Path, default=Path(shared) / "data", help="folder with banking77/")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--points", type=Path, help="folder that keeps finished trainings")
    parser.add_argument("--rows", type=int, default=1600, help="n, the rows of a sub-sampling")
    parser.add_argument("--times", type=int, default=40, help="sub-samplings")
    options = parser.parse_args()
    main(options.data, options.out, options.points, options.rows, options.times)
