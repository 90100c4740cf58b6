"""LoRA, QLoRA and full fine-tuning side by side: memory by part, time, accuracy, forgetting.

    python benchmarks/methods.py [--data DIR] [--out FILE] [--work DIR] [--budget SECONDS] [--quick]

Two cores are enough: about 12 minutes in all, in parts. Finished parts are kept in --work, so a run that was stopped,
or that stopped at --budget, goes on where it was. Prints Markdown tables; --out writes the same numbers as JSON.
DIR holds arc_easy/test.jsonl, with which forgetting is measured.
"""

import argparse
import json
import logging
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from parts import gathered, parser, placed

from ftnb.cli import STORE
from ftnb.data import dedupe, group_near, split, store_records
from ftnb.evaluate import mcnemar, predict, rate
from ftnb.forgetting import answered, likelihoods, read_questions
from ftnb.format import same_answer
from ftnb.memory import measure, memory
from ftnb.model import count_params, load_model, load_tokenizer, lora_config, quiet
from ftnb.plan import Recipe, write_text
from ftnb.train import labelled_loss, load_run, train

warnings.simplefilter("ignore", FutureWarning)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
DTYPES = {"lora": "bfloat16", "qlora": "bfloat16", "full": "float32"}  # as `ftnb.train` keeps the weights
RATES = {"lora": (1e-3, 2e-4), "qlora": (1e-3,), "full": (1e-4, 2e-5)}
MODEL = Recipe(**STORE).model
SIZES, GRADED = ((2, 64), (2, 256), (8, 64), (8, 256)), 24  # rows x tokens; graded tokens a row


def recipe_of(method, **changes):
    return Recipe(**STORE).replace(method=method, dtype=DTYPES[method], **changes)


# Memory and time: one step of `ftnb.train`, on rows of equal length


def ready(method):
    recipe = recipe_of(method)
    with quiet():
        from peft import get_peft_model

        model = load_model(recipe.model, recipe.dtype, method)
        model = model if method == "full" else get_peft_model(model, lora_config(recipe))
    trained = [p for p in model.train().parameters() if p.requires_grad]
    return recipe, model, torch.optim.AdamW(trained, lr=1e-5, fused=True)


def stepper(method, model, rows, tokens, loss_of=labelled_loss):
    from peft.helpers import disable_input_dtype_casting

    torch.manual_seed(0)
    ids = torch.randint(0, 40_000, (rows, tokens))
    labels = ids.clone()
    labels[:, :-GRADED] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    mixed = DTYPES[method] == "bfloat16"

    def loss():
        with ExitStack() as stack:
            if mixed:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                stack.enter_context(disable_input_dtype_casting(model))
            return loss_of(model, batch)

    return loss


def plain_loss(model, batch):
    "The loss by transformers' own calls, on graded positions: what `memory` predicts."
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]
    wanted = batch["labels"][:, 1:]
    logits = base.get_output_embeddings()(hidden[wanted != -100]).float()
    return torch.nn.functional.cross_entropy(logits, wanted[wanted != -100])


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def one_case(method, rows, tokens):
    "In a process of its own: what the system says, then what the tensors say."
    torch.nn.Linear(64, 64)(torch.ones(8, 64)).sum().backward()
    before = resident("VmRSS:")
    recipe, model, optimizer = ready(method)
    loss = stepper(method, model, rows, tokens, plain_loss)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(2):
        loss().backward()
        optimizer.step()  # gradients stay, as between two batches of one update
    peak = resident("VmHWM:") - before
    found = measure(model, loss, optimizer)
    want = memory(model.config, recipe, rows, tokens, GRADED)
    sizes = {"predicted": asdict(want), "measured": asdict(found), "resident": peak}
    return {"method": method, "rows": rows, "tokens": tokens} | count_params(model) | sizes


def memory_part(method, rows, tokens):
    command = [sys.executable, __file__, "--case", f"{method}:{rows}:{tokens}"]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


def time_part(quick):
    "Seconds of an update of 8 x 128 tokens, methods in turn; the first round warms up."
    made, seconds = {}, {method: [] for method in DTYPES}
    for method in DTYPES:
        _, model, optimizer = ready(method)
        made[method] = optimizer, stepper(method, model, 8, 128)
    for _ in range(2 if quick else 6):
        for method, (optimizer, loss) in made.items():
            start = time.perf_counter()
            value = loss()
            value.backward()
            norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds[method].append(round(time.perf_counter() - start, 3))
            assert torch.isfinite(value) and torch.isfinite(norm) and norm > 0, (method, value, norm)
    return {method: {"least": min(all_[1:]), "rounds": all_[1:]} for method, all_ in seconds.items()}


# What a model knew before: ARC-Easy, the likeliest choice


def arc_part(model, tokenizer, data, n):
    asked = read_questions(data / "arc_easy/test.jsonl", n=n)
    sums = likelihoods(model, tokenizer, asked)
    return {"likelihood": answered(sums, asked), "a character": answered(sums, asked, "character")}


# Training on the store's messages


def store_splits(quick):
    records = group_near(dedupe(store_records()))
    return split(records[:80] if quick else records, val=0.1, test=0.2, seed=0, min_test=10 if quick else 150)


def trained_part(method, rate_, work, data, quick):
    recipe = recipe_of(method, name=f"{method}-{rate_:g}", learning_rate=rate_, epochs=1.0, early_stopping=0)
    recipe = recipe.replace(max_new_tokens=8 if quick else recipe.max_new_tokens)
    splits = store_splits(quick)
    out = work / recipe.name
    start = time.perf_counter()
    run = train(recipe, splits, out, max_answers=8)  # a finished run is returned at once
    seconds = time.perf_counter() - start
    model, tokenizer = load_run(run, "bfloat16")
    test = list(splits.test)[: 8 if quick else None]
    answers = predict(model, tokenizer, test, recipe)
    frames = [same_answer(p.expected, p.output) for p in answers]
    intents = [p.wanted == p.answered for p in answers]
    found = {
        "method": method,
        "learning_rate": rate_,
        "updates": run.metrics["steps"],
        "n_train": len(splits.train),
    }
    found |= {
        "trainable": run.metrics["trainable"],
        "seconds": round(seconds, 1),
        "val_loss": run.metrics["eval_loss"],
    }
    return found | {
        "frames": frames,
        "intents": intents,
        "arc": arc_part(model, tokenizer, data, 20 if quick else 200),
    }


# Parts, tables, verdicts


def parts(args):
    yield "time", lambda: time_part(args.quick)
    for method in ("lora",) if args.quick else DTYPES:
        for rows, tokens in SIZES[:1] if args.quick else SIZES:
            yield f"memory {method} {rows} {tokens}", partial(memory_part, method, rows, tokens)
    n = 20 if args.quick else 200

    def before():
        tokenizer = load_tokenizer(MODEL)
        return arc_part(load_model(MODEL, "bfloat16"), tokenizer, args.data, n)

    yield "before", before
    asked = [(m, rates[k]) for k in (0, 1) for m, rates in RATES.items() if k < len(rates)]
    for method, rate_ in asked[:3] if args.quick else asked:
        run = partial(trained_part, method, rate_, args.work, args.data, args.quick)
        yield f"{method} {rate_:g}", run


def share(hits):
    found = rate(hits)
    return {"value": found.value, "n": found.n, "low": found.low, "high": found.high}


def shown(found):
    return f"{found['value']:.1%} ({found['low']:.0%} to {found['high']:.0%})"


def table(head, rows):
    print("| " + " | ".join(head) + " |\n|" + "--|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print()


def memory_rows(cases):
    for case in cases:
        want, got = case["predicted"], case["measured"]
        ratios = {part: want[part] / got[part] for part in want}
        case["ratios"] = ratios | {"total": sum(want.values()) / sum(got.values())}
        case["ratios"]["resident"] = sum(want.values()) / case["resident"]
        where = f"{case['method']}, {DTYPES[case['method']]}", f"{case['rows']} x {case['tokens']}"
        yield *where, f"{sum(got.values()) / 1e6:.0f}", *(f"{r:.2f}" for r in case["ratios"].values())


def run_rows(runs, before, seconds):
    for run in runs:
        was, now = before["likelihood"], run["arc"]["likelihood"]
        run |= {name: share(run[name]) for name in ("frames", "intents")}
        run["knows"] = {way: share(hits) for way, hits in run["arc"].items()}
        lost, won = (sum(a and not b for a, b in pair) for pair in (zip(was, now), zip(now, was)))
        run["forgot"] = {"lost": lost, "won": won, "p": mcnemar(was, now)}
        run["seconds_an_update"] = seconds[run["method"]]["least"]
        del run["arc"]
        yield (
            *(f"{run['method']}, {run['learning_rate']:g}", f"{run['trainable']:,}"),
            *(f"{run['seconds_an_update']:.2f}", f"{run['val_loss']:.3f}"),
            *(shown(run["intents"]), shown(run["frames"]), shown(run["knows"]["likelihood"])),
            f"{lost} lost, {won} won, p = {run['forgot']['p']:.2f}",
        )


def savings(cases):
    "What LoRA saves of the measured step of full fine-tuning, by size; each in the type `ftnb.train` takes."
    sizes = {(c["method"], c["rows"], c["tokens"]): sum(c["measured"].values()) for c in cases}
    return {
        f"lora saves, {rows} x {tokens}": 1 - sizes["lora", rows, tokens] / size
        for (method, rows, tokens), size in sizes.items()
        if method == "full"
    }


def kept(low, high, draws=4000):
    "Share of right answers of one method over that of another on the same rows, with its 95 % interval by bootstrap."
    pairs = np.array([low, high], float)
    drawn = np.random.default_rng(0).integers(0, pairs.shape[1], (draws, pairs.shape[1]))
    over = pairs[0][drawn].mean(1) / np.maximum(pairs[1][drawn].mean(1), 1e-9)
    edges = np.quantile(over, (0.025, 0.975))
    value = pairs[0].mean() / pairs[1].mean() if pairs[1].any() else None
    return {"value": value, "n": pairs.shape[1], "low": float(edges[0]), "high": float(edges[1])}


def shares(runs, rows):
    "What LoRA keeps of full fine-tuning, and QLoRA of LoRA: the best run of each by validation loss."
    best = {m: min((r for r in runs if r["method"] == m), key=lambda r: r["val_loss"]) for m in DTYPES}
    found = {}
    for name, low, high in (("lora of full", "lora", "full"), ("qlora of lora", "qlora", "lora")):
        for kind in ("intents", "frames"):
            pair = (rows[best[m]["method"], best[m]["learning_rate"]][kind] for m in (low, high))
            found[f"{name}, {kind}"] = kept(*pair)
    return found


def main(args):
    args.work.mkdir(parents=True, exist_ok=True)
    results = gathered(parts(args), args.work, args.budget)
    seconds, before = results.pop("time", None), results.pop("before", None)
    cases = [results.pop(name) for name in list(results) if name.startswith("memory ")]
    rows = {(r["method"], r["learning_rate"]): dict(r) for r in results.values()}
    runs, made = list(results.values()), {"seconds": seconds, "memory": cases}
    kinds = ("weights", "gradients", "optimiser", "activations", "logits", "working", "total", "resident")
    table(("method", "rows x tokens", "measured, MB", *kinds), memory_rows(made["memory"]))
    if before:
        head = ("method, learning rate", "trained", "s an update", "validation loss", "intent", "whole frame")
        table((*head, "ARC-Easy", "against before"), run_rows(runs, before, seconds))
        made |= {"runs": runs, "before": {way: share(hits) for way, hits in before.items()}}
        known = [shown(found) for found in made["before"].values()]
        print(f"ARC-Easy before: {known[0]}, by a character {known[1]}\n")
    made["verdicts"] = savings(made["memory"])
    made["verdicts"] |= shares(runs, rows) if {run["method"] for run in runs} == set(DTYPES) else {}
    table(
        ("share", "value"),
        [(k, shown(v) if isinstance(v, dict) else f"{v:.1%}") for k, v in made["verdicts"].items()],
    )
    made["versions"] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if args.out:
        write_text(args.out, json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    told = parser(__doc__, "arc_easy/", "about a minute")
    told.add_argument("--case", help=argparse.SUPPRESS)
    options = told.parse_args()
    if options.case:
        method, rows, tokens = options.case.split(":")
        print(json.dumps(one_case(method, int(rows), int(tokens))))
    else:
        main(placed(options, "methods", "arc_easy/test.jsonl"))
