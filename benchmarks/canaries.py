"""What a tuned model gives away of its training rows: canaries among 2,000 of Banking77's messages, the default model.

    python benchmarks/canaries.py [--data DIR] [--out FILE] [--work DIR] [--budget SECONDS] [--rates R...] [--quick]

Ten made-up people's codes each are written 0, 1, 4 and 16 times into answers, and 16 times into questions (no loss is
computed there); the rest of the 2,000 rows are customers' messages with their labels. One training at the guide's
learning rate, one at five times it. About 40 CPU minutes, in parts that are kept in --work. --out writes every
rank, from which `ftnb.canaries.leaks` makes the table. DIR holds banking77/train.jsonl.
"""

import json
import logging
import time
import warnings
from functools import partial

from parts import gathered, parser, placed

from ftnb.canaries import canaries, exposures, leaks, plant, read_exposures, save_exposures
from ftnb.data import Splits, load
from ftnb.model import load_model, load_tokenizer
from ftnb.plan import Recipe, write_text
from ftnb.train import load_run, spread, train

warnings.simplefilter("ignore", FutureWarning)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
RATES = (2e-4, 1e-3)
RECIPE = Recipe(
    name="canaries",
    task="classification",
    system="You are the help desk of a bank.",
    batch_size=16,
    accumulation=1,
    epochs=3.0,
    evals_per_epoch=1,
    early_stopping=0,
    max_new_tokens=16,
    dtype="bfloat16",
)


def planted(quick):
    return canaries((0, 1, 4, 16), in_questions=(16,), each=2 if quick else 10)


def splits(args):
    birds, records = planted(args.quick), load(args.data / "banking77/train.jsonl").records
    n, held = (160 if args.quick else 2000) - sum(c.repeats for c in birds), 40
    drawn = spread(records, n + held)  # the file is sorted by label
    val = drawn[:: (n + held) // held][:held]
    kept = {r.id for r in val}
    return Splits(plant([r for r in drawn if r.id not in kept][:n], birds), val, val)


def asked(args, model, tokenizer):
    return save_exposures(exposures(model, tokenizer, planted(args.quick), RECIPE.system))


def base(args):
    return asked(args, load_model(RECIPE.model, RECIPE.dtype).eval(), load_tokenizer(RECIPE.model))


def tuned(args, rate):
    recipe = RECIPE.replace(learning_rate=rate, epochs=1.0 if args.quick else RECIPE.epochs)
    begun = time.perf_counter()
    run = train(recipe, splits(args), args.work / f"run-{rate:g}", max_answers=40, allow_leakage=True)
    took = time.perf_counter() - begun
    return {
        "name": f"{recipe.epochs:g} epochs at {rate:g}",
        "learning_rate": rate,
        "seconds": round(took, 1),
        "val_loss": run.metrics.get("eval_loss"),
        "exposures": asked(args, *load_run(run, RECIPE.dtype)),
    }


def main(args):
    args.work.mkdir(parents=True, exist_ok=True)
    todo = [
        ("base", partial(base, args)),
        *((f"rate {r:g}", partial(tuned, args, r)) for r in sorted(args.rates, reverse=True)),
    ]
    results = gathered(todo, args.work, args.budget, "part-")
    if len(results) < len(todo):
        return
    rows = splits(args)
    made = {
        "model": RECIPE.model,
        "quick": args.quick,
        "rows": len(rows.train),
        "canary rows": sum("canary" in r.meta for r in rows.train),
        "base": results["base"],
        "runs": [results[f"rate {r:g}"] for r in sorted(args.rates)],
    }
    write_text(args.out or args.work / "canaries.json", json.dumps(made) + "\n")
    for run in [{"name": "before training", "exposures": made["base"]}, *made["runs"]]:
        print(run["name"], leaks(read_exposures(run["exposures"]))._repr_markdown_(), sep="\n")


if __name__ == "__main__":
    told = parser(__doc__, "banking77/", "two minutes")
    told.add_argument(
        "--rates", type=float, nargs="+", default=RATES, help="learning rates, one training each"
    )
    main(placed(told.parse_args(), "canaries", "banking77/train.jsonl"))
