"""Write the README's table and figure from a finished `ftnb run`: docs/results.json and nbs/images/results.png.

    python tools/results.py [runs/store]

Nothing is typed by hand: every number is read from the run's reports, its agreements and its steps.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("frame_match", "intent_accuracy", "slot_f1", "json_validity")
DRAWN = {"frame_match": "the whole answer is right", "intent_accuracy": "the intent is right"}
NAMES = {
    "base": "base, instructions only",
    "few-shot": "base, instructions and examples",
    "tuned": "tuned (LoRA)",
    "tfidf": "TF-IDF + logistic regression",
}


def estimate(value) -> str:
    "A number with its interval, as the README shows it."
    return f"{value.value:.1%} ({value.low:.0%} to {value.high:.0%})"


def draw(reports: dict):
    "The figure of the README: two questions, every system, intervals; readable at the width of a phone."
    import matplotlib.pyplot as plt

    from ftnb.evaluate import COLOURS

    shown = [(m, name, r.metrics[m]) for m in DRAWN for name, r in reports.items() if m in r.metrics]
    fig, axes = plt.subplots(
        len(DRAWN),
        figsize=(4.4, 1.95),
        layout="constrained",
        sharex=True,
        height_ratios=[sum(m == one for one, *_ in shown) for m in DRAWN],
    )
    for ax, (metric, title) in zip(axes, DRAWN.items()):
        bars = [(name, value) for one, name, value in shown if one == metric]
        for y, (name, e) in enumerate(bars):
            colour = COLOURS[list(reports).index(name)]
            ax.barh(y, e.value, color=colour, height=0.72, alpha=0.75)
            ax.plot([e.low, e.high], [y, y], color="black", linewidth=1)
            ax.text(max(e.high, e.value) + 0.02, y, f"{e.value:.0%}", va="center", fontsize=8)
        ax.set_yticks(range(len(bars)), [NAMES[name] for name, _ in bars], fontsize=8)
        ax.set_title(title, fontsize=8, weight="bold", loc="left", pad=2)
        ax.set(xlim=(0, 1.12), ylim=(len(bars) - 0.4, -0.6), xticks=[])
        ax.spines[["top", "right", "bottom"]].set_visible(False)
    return fig


def main() -> int:
    "Exit code 2 when the run has no reports."
    from ftnb.evaluate import TITLES, Report, compare
    from ftnb.plan import write_bytes, write_text
    from ftnb.train import Run

    run = Run.load(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "store"))
    paths = {name: run.dir / "reports" / f"{name}.json" for name in NAMES}
    reports = {name: Report.load(path) for name, path in paths.items() if path.exists()}
    if "tuned" not in reports:
        print(
            f"ftnb results: {run.dir} has no report of the tuned model; ftnb evaluate makes it",
            file=sys.stderr,
        )
        return 2
    rows = [
        [NAMES[name], *(estimate(r.metrics[m]) if m in r.metrics else "–" for m in METRICS)]
        for name, r in reports.items()
    ]
    n, m = reports["tuned"].n, run.metrics
    sides = {name: len(rows) for name, rows in run.splits.items()}
    found = [json.loads(p.read_text("utf-8")) for p in sorted((run.dir / "agreement").glob("*.json"))]
    exports = "; ".join(
        f"{a['kind']} {a['size'] / 1e6:,.0f} MB, {a['same']} of {a['n']} answers token for token"
        for a in found
    )
    note = (
        f"Held-out test, n = {n} messages, 95 % intervals. {sides['train']} messages trained on, {sides['val']} chose the "
        f"checkpoint; no wording stands on two sides. The model has 135 million parameters and was read from a file "
        f"rounded to 4 bits: another base gives other numbers. Training took {m['seconds'] / 60:.0f} minutes on two CPU "
        f"cores, peak memory {m['peak_memory'] / 1e9:.1f} GB. Exports that answer like the run: {exports}."
    )
    if "tfidf" in reports:
        against = compare(reports["tuned"], reports["tfidf"])
        note += (
            f" On the intent alone, {str(against).rstrip('.')}: a linear classifier is hard to beat at naming a class; "
            "the whole frame needs the language model."
        )
    titles = [TITLES.get(name, name) for name in METRICS]
    table = {"columns": ["system", *titles], "rows": rows, "note": note}
    fields = ("kind", "size", "same", "n", "low", "high", "metric", "first_token_ms", "per_token_ms")
    table["exports"] = [
        {k: a[k] for k in fields} | {"score": a["score"]["value"], "score_run": a["score_run"]["value"]}
        for a in found
    ]
    table["alt"] = "; ".join(
        f"{title}: "
        + ", ".join(f"{NAMES[k]} {r.metrics[m].value:.0%}" for k, r in reports.items() if m in r.metrics)
        for m, title in DRAWN.items()
    )
    table["caption"] = (
        f"Share of {n} held-out messages, with 95 % intervals. A model of 135 million parameters, rounded to 4 bits, "
        f"tuned in {m['seconds'] / 60:.0f} minutes on two CPU cores."
    )
    write_text(ROOT / "docs" / "results.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    figure = draw(reports)
    path = ROOT / "nbs" / "images" / "results.png"
    path.parent.mkdir(exist_ok=True)
    from io import BytesIO

    held = BytesIO()
    figure.savefig(held, format="png", dpi=150)
    write_bytes(path, held.getvalue())
    print(f"wrote docs/results.json and {path.relative_to(ROOT)} from {run.recipe.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
