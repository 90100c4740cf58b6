"""The guide's three cures for forgetting, and a budget, on the default model: task score against knowledge kept.

    python benchmarks/forgetting.py [--data DIR] [--out FILE] [--work DIR] [--budget SECONDS] [--quick]

Two cores are enough: at most 20 minutes in all, in parts. Finished parts are kept in --work, so a run that was
stopped, or that stopped at --budget, goes on where it was. Prints a Markdown table; --out writes the answers row by
row, from which `ftnb.forgetting.read_cures` makes intervals and the figure. DIR holds arc_easy/test.jsonl, which is
asked, and general_instructions/seed_tasks.jsonl, which is mixed in.
"""

import json
import logging
import time
import warnings
from functools import partial

import torch
from parts import gathered, parser, placed

from ftnb.cli import STORE
from ftnb.data import Splits, dedupe, group_near, split, store_records
from ftnb.evaluate import predict
from ftnb.forgetting import (
    ForgettingBudget,
    kept_knowledge,
    knowledge,
    mix_replay,
    read_cures,
    read_general,
    read_questions,
)
from ftnb.format import same_answer
from ftnb.model import load_model, load_tokenizer
from ftnb.plan import Recipe, write_text
from ftnb.sweep import subset
from ftnb.train import load_run, train

warnings.simplefilter("ignore", FutureWarning)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
MODEL, DTYPE = Recipe(**STORE).model, "bfloat16"
PLAIN = {
    "learning_rate": 1e-2,
    "r": 16,
    "alpha": 32,
}  # far too high for this model, so that there is something to cure
LONGEST = 900  # characters of a general row: longer ones would take most of the time
WAYS = (  # name, note, changed fields, share of general rows, budget in points
    ("plain", "1e-2, r 16", {}, 0.0, None),
    ("lower learning rate", "2e-3", {"learning_rate": 2e-3}, 0.0, None),
    ("smaller rank", "r 2", {"r": 2, "alpha": 4}, 0.0, None),
    ("replay", "30% seed tasks", {}, 0.3, None),
    ("budget", "5 points", {}, 0.0, 5.0),
)


def sizes(quick):
    "Training rows, test rows, questions."
    return (32, 12, 24) if quick else (256, 150, 400)


def bits(right):
    return "".join("01"[bool(r)] for r in right)


def asked(args):
    return read_questions(args.data / "arc_easy/test.jsonl", n=sizes(args.quick)[2])


def rows(args, share):
    train_rows, test_rows, _ = sizes(args.quick)
    drawn = split(group_near(dedupe(store_records())), val=0.1, test=0.2, seed=0, min_test=150)
    part = Splits(subset(drawn.train, train_rows), drawn.val[:24], subset(drawn.test, test_rows), drawn.seed)
    if not share:
        return part
    general = read_general(args.data / "general_instructions/seed_tasks.jsonl")
    general = [
        r for r in general if sum(len(m["content"]) for m in r.messages) + len(r.completion) <= LONGEST
    ]
    return mix_replay(part, general, share, questions=asked(args))


def before(args):
    tokenizer = load_tokenizer(MODEL)
    return {"right": bits(knowledge(load_model(MODEL, DTYPE), tokenizer, asked(args)))}


def way(args, name, note, changes, share, points):
    recipe = Recipe(**STORE | PLAIN | changes).replace(
        name=name.replace(" ", "-"), dtype=DTYPE, early_stopping=0
    )
    recipe = recipe.replace(epochs=1.0 if args.quick else 2.0, evals_per_epoch=2, max_new_tokens=64)
    out, splits, callbacks = args.work / recipe.name, rows(args, share), ()
    if points is not None:
        callbacks = (ForgettingBudget(out, load_tokenizer(MODEL), asked(args), points, say=print),)
    start = time.perf_counter()
    run = train(recipe, splits, out, max_answers=4 if args.quick else 16, callbacks=callbacks)
    seconds = time.perf_counter() - start
    model, tokenizer = load_run(run, DTYPE)
    answers = predict(model, tokenizer, list(splits.test), recipe)
    made = {"name": name, "note": note, "task": bits(same_answer(p.expected, p.output) for p in answers)}
    made |= {"intents": bits(p.wanted == p.answered for p in answers)}
    made |= {"right": bits(knowledge(model, tokenizer, asked(args))), "seconds": round(seconds, 1)}
    made |= {"steps": run.metrics["steps"], "best_step": run.best_step, "n_train": len(splits.train)}
    made |= {"val_loss": run.metrics["eval_loss"], "trainable": run.metrics["trainable"]}
    kept = kept_knowledge(run.dir)
    return made | ({"kept": str(kept), "stopped": kept.stopped} if kept else {})


def parts(args):
    yield "before", partial(before, args)
    for one in WAYS:
        yield one[0], partial(way, args, *one)


def main(args):
    args.work.mkdir(parents=True, exist_ok=True)
    results = gathered(parts(args), args.work, args.budget, "part-")
    known = results.pop("before", None)
    if not results:
        return
    made = {
        "model": MODEL,
        "questions": "arc_easy test",
        "before": known["right"],
        "runs": list(results.values()),
    }
    made |= {
        "quick": args.quick,
        "versions": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    file = write_text(args.out or args.work / "forgetting.json", json.dumps(made, indent=1) + "\n")
    print(read_cures(file)._repr_markdown_())
    for run in made["runs"]:
        print(
            f"{run['name']}: {run['seconds']:.0f} s, best step {run['best_step']} of {run['steps']}", end=""
        )
        print(f"; {run['kept']}" if "kept" in run else "")


if __name__ == "__main__":
    options = parser(__doc__, "arc_easy/ and general_instructions/", "a few minutes").parse_args()
    main(placed(options, "forgetting", "arc_easy/test.jsonl", "general_instructions/seed_tasks.jsonl"))
