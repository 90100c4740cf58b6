"""What `diagnose` says of tiny runs whose fault was planted, and how often it is wrong.

    python benchmarks/diagnose.py --out docs/diagnose.json [--seconds 150]
    python benchmarks/diagnose.py --replay --out docs/diagnose.json

Every run goes through `ftnb.train.train` with a two-layer model that was first taught eight words to answer with. The
fault is planted by its mechanism: a learning rate, a batch, a warm-up, an optimiser without gradient, answers without
end of turn. The first half of each cause's runs chose the thresholds in `ftnb.diagnose.LIMITS`; the second half, not
looked at for that, gives the error rates. The histories go to diagnose_runs.json.gz beside --out; a run that is there
is not made again, so the work can be done in parts of --seconds. --replay makes no run and judges the kept histories.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("IN_TEST", "1")  # no bars

COUNTS = {
    "healthy": 26,
    "plateau": 14,
    "nothing-learnt": 14,
    "noise": 14,
    "divergence": 14,
    "over-fitting": 14,
    "under-trained": 14,
    "warm-up": 14,
    "no-effect": 14,
    "no-end": 14,
}
ANSWERS = "home travel health weather science money food music".split()
FILLER = """river stone window paper garden winter yellow doctor engine bottle market silver forest cloud summer pocket
mirror basket island letter candle kitchen orange bridge ladder castle planet ticket rocket button""".split()
CUES = """return charge receipt payment flight hotel train visa pain fever pill nurse rain snow storm wind ball match team
coach king war queen battle""".split()


# A small world: messages of words, one of which decides the answer


def record(name, words, answer):
    from ftnb.data import Record

    return Record(name, ({"role": "user", "content": " ".join(words)},), answer, label=answer)


def messages(n, rule, other, seed, flip=0.0, tail=False):
    "Distinct messages; `rule` maps a cue to an answer, `flip` is the share of answers drawn by lot."
    draw, made, answers = random.Random(seed), {}, sorted(set(rule.values()))
    while len(made) < n:
        cue = draw.choice(list(rule))
        words = [draw.choice(other) for _ in range(draw.randint(4, 8))]
        words.insert(draw.randrange(len(words) + 1), cue)
        answer = draw.choice(answers) if draw.random() < flip else rule[cue]
        if tail:  # part of the answer cannot be known: the loss has a floor far from zero
            answer += " " + draw.choice(FILLER[:8])
        made.setdefault(" ".join(words), (words, answer))
    return [record(f"{seed}-{i}", words, answer) for i, (words, answer) in enumerate(made.values())]


def base_model(tokenizer, steps=400, seed=0):
    "A two-layer Llama taught another rule over the same words; in two of three rows its answer runs on."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from ftnb.format import encode_dataset
    from ftnb.plan import Recipe
    from ftnb.train import labelled_loss

    torch.manual_seed(seed)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **shape, **ends
        )
    )
    rule = {word: ANSWERS[i % len(ANSWERS)] for i, word in enumerate(CUES)}
    known, draw = messages(1500, rule, FILLER, seed), random.Random(seed)
    for i in range(0, len(known) * 2 // 3):
        tail = ["and", draw.choice(FILLER), *"so on and on and on".split()]
        known[i] = record(known[i].id, known[i].text.split(), " ".join([known[i].completion, *tail]))
    data = encode_dataset(tokenizer, known, Recipe(max_length=128))
    rows, batch_of = list(data), DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    plan = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        loss = labelled_loss(model, batch_of(draw.sample(rows, 32)))
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        plan.step()
    return model


# What is planted: settings, rows, and for some a hand in the machinery


def plan_run(cause, number):
    "Settings of one run: those of a healthy run, then what the cause changes."
    draw = random.Random(f"{cause}-{number}")
    batch = draw.choice([8, 16])
    plan = {
        "learning_rate": 10 ** draw.uniform(-2.5, -2.0),
        "batch_size": batch,
        "accumulation": draw.choice([1, 1, 2]) if batch == 8 else 1,
        "epochs": draw.choice([5, 6, 8]),
        "r": draw.choice([4, 8, 16]),
        "scheduler": draw.choice(["cosine", "linear", "constant_with_warmup"]),
        "warmup_steps": None,
        "max_grad_norm": 1.0,
    }
    rows = {
        "n": draw.choice([120, 160, 200]),
        "classes": draw.choice([3, 4, 6]),
        "flip": draw.choice([0, 0, 0.05]),
    }
    rows["tail"], trick = draw.random() < 0.2, None
    if cause == "plateau":
        plan["learning_rate"] *= 10 ** draw.uniform(-3, -2)
    elif cause == "nothing-learnt":
        rows |= {"flip": 1.0, "tail": False}
    elif cause == "noise":
        plan |= {"batch_size": 1, "accumulation": 1, "epochs": 2, "scheduler": "constant_with_warmup"}
        plan["learning_rate"] *= 10 ** draw.uniform(0.3, 0.7)
        rows["n"] = draw.choice([80, 100, 120])
    elif cause == "divergence":
        plan["learning_rate"] = min(1.0, plan["learning_rate"] * 10 ** draw.uniform(1.5, 2.2))
        plan["max_grad_norm"] = draw.choice([0.0, 1.0])
    elif cause == "over-fitting":
        plan["epochs"] = 30
        rows |= {
            "n": draw.choice([24, 32]),
            "flip": draw.choice([0.2, 0.3]),
            "classes": draw.choice([4, 6]),
        }
    elif cause == "under-trained":
        plan |= {"epochs": draw.choice([0.5, 0.75, 1]), "batch_size": 8, "accumulation": 1}
        plan["learning_rate"] *= draw.uniform(0.12, 0.3)
        rows["n"] = 200
    elif cause == "warm-up":
        plan["warmup_steps"] = draw.uniform(0.75, 0.98)
    elif cause == "no-effect":
        trick = draw.choice(["no gradient", "rate of zero", "dead adapter", "rate 1e-8"])
        plan["learning_rate"] = 1e-8 if trick == "rate 1e-8" else plan["learning_rate"]
    elif cause == "no-end":
        trick = "no end of turn"
    return plan, rows, trick


def splits_for(rows, number):
    from ftnb.data import Splits

    draw = random.Random(number)
    answers, renamed = draw.sample(ANSWERS, rows["classes"]), draw.sample(range(len(ANSWERS)), len(ANSWERS))
    rule = {cue: answers[renamed[i % len(ANSWERS)] % len(answers)] for i, cue in enumerate(CUES)}
    make = lambda n, seed: messages(n, rule, FILLER, seed, rows["flip"], rows["tail"])  # noqa: E731
    return Splits(make(rows["n"], number * 3 + 1), make(32, number * 3 + 2), make(8, number * 3 + 3))


def planted(trick):
    "Context in which `train` is damaged below the recipe; everything is put back after."
    from contextlib import contextmanager

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    import ftnb.train as module

    class NoGradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for weight in model.parameters():
                weight.grad = None

    class Dead(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.zeros_(weight)

    class RateOfZero(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    def without_end(tokenizer, records, recipe):
        data = encode(tokenizer, records, recipe)
        end = tokenizer.eos_token_id
        labels = [[-100 if y == end else y for y in row] for row in data["labels"]]
        return Dataset.from_dict({"input_ids": list(data["input_ids"]), "labels": labels})

    encode, proof, make = module.encode_dataset, module.check_before, module.make_trainer
    extra = {"no gradient": NoGradient, "rate of zero": RateOfZero, "dead adapter": Dead}.get(trick)

    def make_damaged(recipe, splits, out, model, tokenizer, callbacks, batch_size=None):
        return make(recipe, splits, out, model, tokenizer, [*callbacks, extra()], batch_size)

    @contextmanager
    def damaged():
        if trick == "no end of turn":
            module.encode_dataset, module.check_before = without_end, lambda *a, **k: None
        elif extra:
            module.make_trainer = make_damaged
        try:
            yield
        finally:
            module.encode_dataset, module.check_before, module.make_trainer = encode, proof, make

    return damaged()


def make_run(cause, number, base, tokenizer, folder):
    "One run; a dict of what `diagnose` reads of it."
    from copy import deepcopy

    from ftnb.diagnose import adapter_effect
    from ftnb.plan import InputError, Recipe
    from ftnb.train import read_jsonl, train

    plan, rows, trick = plan_run(cause, number)
    evals = 8 if plan["epochs"] <= 1 else 2 if plan["epochs"] == 2 else 1
    changes = plan | {"warmup_steps": None, "alpha": 2 * plan["r"], "evals_per_epoch": evals, "seed": number}
    wanted = Recipe(
        name=f"{cause}-{number}",
        task="generation" if rows["tail"] else "classification",
        max_new_tokens=4 + 2 * rows["tail"],
        max_length=128,
        dtype="float32",
        early_stopping=0,
        **changes,
    )
    if plan["warmup_steps"] is not None:
        total = wanted.total_steps(rows["n"])
        wanted = wanted.replace(warmup_steps=max(1, round(plan["warmup_steps"] * total)))
    out, stopped = Path(folder) / wanted.name, ""
    with planted(trick):
        try:
            run = train(wanted, splits_for(rows, number), out, deepcopy(base), tokenizer, allow_leakage=True)
            effect = adapter_effect(run.adapter_dir)
        except InputError as error:  # a loss that is no number: the history up to there is judged
            stopped, effect = str(error), None
    history = read_jsonl(out / "history.jsonl")
    changed = {k: v for k, v in vars(wanted).items() if v != getattr(Recipe(), k)}
    return {
        "cause": cause, "number": number, "trick": trick, "rows": rows, "recipe": changed, "stopped": stopped, "effect": effect,
        "logs": [[h[k] for k in LOG] for h in history if "loss" in h],
        "evals": [[h[k] for k in EVAL] for h in history if "eval_loss" in h],
    }  # fmt: skip


LOG = ("step", "loss", "learning_rate", "grad_norm")
EVAL = ("step", "eval_loss", "eval_match", "eval_finished", "eval_n")


def history_of(kept):
    "The history that was kept of a run, as `Run.history` gives it."
    entries = [dict(zip(LOG, row)) for row in kept["logs"]] + [dict(zip(EVAL, row)) for row in kept["evals"]]
    return tuple(sorted(entries, key=lambda h: (h["step"], "eval_loss" in h)))


def load_kept(path):
    return json.loads(gzip.decompress(Path(path).read_bytes())) if Path(path).exists() else []


def save_kept(path, runs):
    from ftnb.plan import write_bytes

    text = json.dumps(runs, separators=(",", ":"))
    write_bytes(path, gzip.compress(text.encode(), 9, mtime=0))


WORKER = {}


def start_worker(folder):
    "One thread a process: the layers are so small that two threads wait for each other most of the time."
    import torch
    from transformers import LlamaForCausalLM

    from ftnb.model import load_tokenizer, quiet

    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # nothing here has to outlive a power cut
    with quiet():
        WORKER["base"] = LlamaForCausalLM.from_pretrained(Path(folder) / "base")
        WORKER["tokenizer"] = load_tokenizer(Path(folder) / "base")


def work(job):
    cause, number, folder = job
    begun = time.time()
    made = make_run(cause, number, WORKER["base"], WORKER["tokenizer"], folder)
    print(f"{cause} {number}: {time.time() - begun:.1f} s", flush=True)
    return made


def make_base(folder):
    from ftnb.model import DEFAULT_MODEL, load_tokenizer, quiet

    tokenizer = load_tokenizer(DEFAULT_MODEL)
    with quiet():
        base_model(tokenizer).save_pretrained(Path(folder) / "base")
        tokenizer.save_pretrained(Path(folder) / "base")


def make_all(path, seconds, workers=2):
    "Makes runs that are not yet kept, until `seconds` are over; True when all are there."
    kept = load_kept(path)
    have = {(k["cause"], k["number"]) for k in kept}
    # one of each cause in turn, so that a part of the work is already a picture of the whole
    todo = [
        (c, n) for n in range(max(COUNTS.values())) for c in COUNTS if n < COUNTS[c] and (c, n) not in have
    ]
    if not todo:
        return True
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        make_base(folder)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, start_worker, (folder,)) as pool:
            jobs = [(cause, number, folder) for cause, number in todo]
            while jobs and time.time() - started < seconds:
                part, jobs = jobs[: 2 * workers], jobs[2 * workers :]
                kept += pool.map(work, part)
                save_kept(path, kept)
    return len(kept) == sum(COUNTS.values())


# What is said of them


def said_of(kept):
    "What `findings` says of a kept run, from its history, its adapter's effect and its validation rows."
    from ftnb.diagnose import findings, signals
    from ftnb.plan import Recipe

    rows = splits_for(kept["rows"], kept["number"]).val
    majority = Counter(r.completion for r in rows).most_common(1)[0][1] / len(rows)
    recipe = Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in kept["recipe"].items()})
    return findings(signals(history_of(kept), kept["effect"], majority), recipe)


def share(k, n):
    from ftnb.evaluate import wilson

    low, high = wilson(k, n)
    return {"k": k, "n": n, "share": round(k / n, 4), "low": round(low, 4), "high": round(high, 4)}


def judged(kept):
    "Confusion, false alarms and recall, for the runs that chose the thresholds and for those held out."
    told = {}
    for half in ("chosen_on", "held_out"):
        runs = [k for k in kept if (k["number"] >= COUNTS[k["cause"]] // 2) == (half == "held_out")]
        counts, notes = {cause: Counter() for cause in COUNTS}, 0
        for k in runs:
            said = said_of(k)
            counts[k["cause"]][next((f.kind for f in said if f.severity != "note"), "healthy")] += 1
            notes += "disagree" in said.kinds
        recall = {cause: share(row[cause], row.total()) for cause, row in counts.items() if row}
        ill = [
            (row[cause], row.total(), row["healthy"]) for cause, row in counts.items() if cause != "healthy"
        ]
        told[half] = {
            "runs": len(runs),
            "right": share(sum(row[cause] for cause, row in counts.items()), len(runs)),
            "false_alarm": share(
                counts["healthy"].total() - counts["healthy"]["healthy"], counts["healthy"].total()
            ),
            "missed": share(sum(m for *_, m in ill), sum(n for _, n, _ in ill)),
            "recall": recall,
            "counts": {cause: dict(sorted(row.items())) for cause, row in counts.items()},
            "disagree": share(notes, len(runs)),
        }
    return told


def show(told):
    counts = told["counts"]
    columns = [*counts, *sorted({s for row in counts.values() for s in row} - set(counts))]
    print("| planted | " + " | ".join(columns) + " | recall (95%) |")
    print("| --- |" + " ---: |" * (len(columns) + 1))
    for cause, row in counts.items():
        r = told["recall"][cause]
        cells = " | ".join(str(row.get(c, "")) for c in columns)
        print(f"| {cause} | {cells} | {r['k']} of {r['n']} ({r['low']:.2f} to {r['high']:.2f}) |")
    for name in ("right", "false_alarm", "missed", "disagree"):
        r = told[name]
        print(f"\n{name}: {r['k']} of {r['n']} ({r['low']:.2f} to {r['high']:.2f})")


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--out", default="docs/diagnose.json")
    ask.add_argument("--seconds", type=float, default=1e9)
    ask.add_argument("--replay", action="store_true")
    given = ask.parse_args()
    path = Path(given.out).with_name("diagnose_runs.json.gz")
    if not given.replay and not make_all(path, given.seconds):
        return print(f"{len(load_kept(path))} of {sum(COUNTS.values())} runs made; run again for the rest")
    from ftnb.plan import write_text

    kept = load_kept(path)
    told = {"runs": len(kept), "stopped": sum(bool(k["stopped"]) for k in kept)} | judged(kept)
    for half in ("chosen_on", "held_out"):
        print(f"\n{half.replace('_', ' ')}, {told[half]['runs']} runs\n")
        show(told[half])
    write_text(given.out, json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
