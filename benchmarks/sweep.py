"""Learning rates for the default model on part of Banking77, with successive halving: which is shown to be better?

    python benchmarks/sweep.py [--data DIR] [--work DIR] [--out FILE]

On two cores about twenty minutes. Trials are kept in --work, so a sweep that was stopped goes on. Prints the verdict; --out
writes every trial with its answers, from which the notebook draws the figure. DIR holds banking77/train.jsonl.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ftnb.cli import Source, prepare
from ftnb.plan import Recipe, cache_dir, write_text
from ftnb.sweep import grid, sweep, verdict

RATES = [1e-4, 2e-4, 3e-4, 5e-4, 1e-3]  # the guide's three, the recipe's own, and one above
ROWS, ANSWERS, EPOCHS = 800, 150, 2.0


def main(args):
    recipe = Recipe.load(Path(__file__).resolve().parent.parent / "recipes/banking77.toml").replace(
        epochs=EPOCHS
    )
    splits = prepare(recipe, Source(data=str(args.data / "banking77/train.jsonl"))).splits
    found = sweep(recipe, splits, grid(learning_rate=RATES), args.work, ROWS, ANSWERS)
    told = verdict(found)
    for trial in found.trials:
        print(f"{trial.state:<10} {trial.seconds:6.1f} s  {trial}: {trial.share:.1%} of {found.n} right")
    print(*told, sep="\n")
    if args.out:
        changed = {k: v for k, v in asdict(recipe).items() if v != getattr(Recipe(), k)}
        made = {"recipe": changed, "rows": found.rows, "n": found.n, "verdict": told}
        write_text(args.out, json.dumps(made | {"trials": [asdict(t) for t in found.trials]}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with banking77/")
    parser.add_argument(
        "--work", type=Path, default=cache_dir() / "sweep-banking77", help="where trials are kept"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    main(parser.parse_args())
