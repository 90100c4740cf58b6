"""Training speed: plain TRL, TRL tuned by hand, and ftnb, on the same Banking77 rows, one after the other.

    python benchmarks/train.py [--data DIR] [--rows 128] [--repeats 3] [--long-rows 48] [--quick] [--out FILE]

Each run is a process of its own on two threads, so its peak memory is its own; the ways take turns within a repeat.
The first update of a run is not timed. Prints Markdown tables; --out writes the same numbers as JSON.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = {"trl": "TRL as it ships", "tuned": "TRL tuned by hand", "ftnb": "ftnb"}
SYSTEM = "Classify the customer message into one intent."
WARMUP = 1  # updates at the start of a run that are not timed
VAL = 64  # validation rows


# One run, in a process of its own


def recipe_for(spec: dict):
    from ftnb.plan import Recipe

    return Recipe(
        name="speed",
        task="classification",
        model=spec["model"],
        system=spec["system"],
        batch_size=spec["batch"],
        accumulation=1,
        epochs=1.0,
        learning_rate=spec["learning_rate"],
        early_stopping=0,
        max_length=2048,
        dtype=spec["dtype"],
        seed=spec["seed"],
    )


def splits_for(spec: dict):
    from ftnb.data import Splits, load

    records = list(load(Path(spec["data"]) / "banking77/train.jsonl").records)
    random.Random(spec["seed"]).shuffle(records)
    n, val = spec["rows"], spec["val"]
    return Splits(train=tuple(records[:n]), val=tuple(records[n : n + val]), test=())


def ours(spec: dict):
    from ftnb.model import load_model, load_tokenizer
    from ftnb.train import make_trainer

    recipe = recipe_for(spec)
    model, tokenizer = load_model(recipe.model, spec["dtype"]), load_tokenizer(recipe.model)
    trainer = make_trainer(recipe, splits_for(spec), Path(spec["out"]), model, tokenizer, [])
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    return trainer


def trls(spec: dict, tuned: bool):
    "TRL with its own defaults; rows, adapter, rate, schedule and effective batch are those of `ours`."
    from trl import SFTConfig, SFTTrainer

    from ftnb.format import encode_dataset
    from ftnb.model import load_tokenizer, lora_config, resolve
    from ftnb.train import sft_config

    recipe, splits = recipe_for(spec), splits_for(spec)
    same = sft_config(recipe, spec["rows"], spec["out"])
    keys = "learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm num_train_epochs seed use_cpu"
    keys += " per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps report_to disable_tqdm"
    hand = {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
    hand["model_init_kwargs"] = {"dtype": spec["dtype"]}
    tokenizer = load_tokenizer(recipe.model)
    return SFTTrainer(
        model=str(resolve(recipe.model)),
        args=SFTConfig(
            output_dir=spec["out"],
            max_length=2048,
            save_strategy="no",
            **{k: getattr(same, k) for k in keys.split()},
            **(hand if tuned else {}),
            **spec.get("config", {}),
        ),
        train_dataset=encode_dataset(tokenizer, splits.train, recipe),
        eval_dataset=encode_dataset(tokenizer, splits.val, recipe),
        processing_class=tokenizer,
        peft_config=lora_config(recipe),
    )


def same_adapter(trainer, seed: int):
    "The adapter's first matrices are drawn by name, so that every way starts from the same weights."
    import torch

    for number, (name, weight) in enumerate(sorted(trainer.model.named_parameters())):
        if "lora_A" in name:
            draw = torch.Generator().manual_seed(seed * 10_007 + number)
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=draw) / weight.shape[1] ** 0.5)


def clock(trainer) -> list[float]:
    "Seconds of each update, filled in while the trainer runs."
    from transformers import TrainerCallback

    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.perf_counter() - self.start)

    trainer.add_callback(Clock())
    return seconds


def run(spec: dict) -> dict:
    "Train once, then the loss on the validation rows."
    import torch

    from ftnb.train import peak_memory

    torch.set_num_threads(2)
    trainer = ours(spec) if spec["way"] == "ftnb" else trls(spec, spec["way"] == "tuned")
    same_adapter(trainer, spec["seed"])
    seconds = clock(trainer)
    trainer.train()
    memory = peak_memory()
    timed = seconds[WARMUP:]
    start = time.perf_counter()
    loss = trainer.evaluate()["eval_loss"]
    return {
        "way": spec["way"],
        "rows_per_second": spec["batch"] * len(timed) / sum(timed),
        "seconds": [round(s, 3) for s in seconds],
        "peak_bytes": memory,
        "eval_loss": loss,
        "eval_seconds": round(time.perf_counter() - start, 2),
    }


def gradient(spec: dict):
    import torch

    trainer = ours(spec) if spec["way"] == "ftnb" else trls(spec, False)
    same_adapter(trainer, spec["seed"])
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(min(4, spec["batch"]))])
    graded = (batch["labels"] != -100).sum()
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=graded).backward()
    grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return torch.cat([grads[n].flatten() for n in sorted(grads)])


def check(spec: dict) -> dict:
    "The floor, and how far our first gradient is from TRL's when all is float32."
    least = floor(spec)
    exact = {**spec, "dtype": "float32", "config": {"bf16": False}}
    plain, own = (gradient({**exact, "way": way}) for way in ("trl", "ftnb"))
    return {"floor": least, "gradient difference": float((own - plain).norm() / plain.norm())}


# The floor: what the model's own matrix products take


def floor(spec: dict) -> dict:
    "Seconds of the products an update cannot do without, timed at the model's shapes; tokens counted once a batch."
    import torch

    from ftnb.train import share

    torch.set_num_threads(2)
    trainer = ours(spec)
    rows, model, counts = trainer.train_dataset, trainer.model.unload(), []
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    for at in range(0, len(order) - spec["batch"] + 1, spec["batch"]):
        batch = trainer.data_collator([rows[i] for i in order[at : at + spec["batch"]]])
        laid = share(batch)
        counts.append(
            (laid.ids.numel(), int((laid.targets != -100).sum()), batch["labels"].numel(), laid.prefix)
        )
    tokens, graded = (round(statistics.mean(c[k] for c in counts)) for k in (0, 1))
    head = model.get_output_embeddings()
    shapes = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            key = (graded if module is head else tokens, *module.weight.shape)
            shapes[key] = shapes.get(key, 0) + 1
    total = sum(n * _product_seconds(*shape, head.weight.dtype) for shape, n in shapes.items())
    flops = sum(n * 4 * a * b * c for (a, b, c), n in shapes.items())
    return {
        "tokens": tokens,
        "graded": graded,
        "padded_tokens": round(statistics.mean(c[2] for c in counts)),
        "prefix": round(statistics.mean(c[3] for c in counts)),
        "seconds": round(total, 4),
        "gflops_per_second": round(flops / total / 1e9, 1),
    }


def _product_seconds(rows, out, inner, dtype, repeats=7):
    "Forward and gradient of the input, best of `repeats`."
    import torch

    x, weight = torch.ones(rows, inner, dtype=dtype), torch.ones(out, inner, dtype=dtype)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        y = x @ weight.T
        y @ weight
        times.append(time.perf_counter() - start)
    return min(times)


# All of them


def child(spec: dict, task: str = "run") -> dict:
    env = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--worker", task, json.dumps(spec)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{spec.get('way', task)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def interleaved(spec: dict, repeats: int) -> list[dict]:
    runs = []
    for repeat in range(repeats):
        for way in WAYS:
            found = child({**spec, "way": way})
            runs.append({"repeat": repeat, **found})
            print(f"  {way} {repeat + 1}: {found['rows_per_second']:.2f} rows/s", file=sys.stderr)
    return runs


def summary(runs: list[dict], least: float, batch: int) -> list[dict]:
    rows = []
    for way, title in WAYS.items():
        mine = [r for r in runs if r["way"] == way]
        speeds = [r["rows_per_second"] for r in mine]
        middle = statistics.median(speeds)
        row = {"way": title, "rows/s": round(middle, 2)}
        row |= {"lowest": round(min(speeds), 2), "highest": round(max(speeds), 2), "n": len(speeds)}
        row |= {"peak MB": round(statistics.median(r["peak_bytes"] for r in mine) / 1e6)}
        row |= {"validation loss": round(statistics.median(r["eval_loss"] for r in mine), 4)}
        rows.append(row | {"floor / time": round(least * middle / batch, 3)})
    for row in rows:
        for key, peer in (("x TRL", rows[0]), ("x tuned", rows[1])):
            row[key] = round(row["rows/s"] / peer["rows/s"], 2)
        row["memory, x TRL"] = round(row["peak MB"] / rows[0]["peak MB"], 2)
    return rows


def table(rows: list[dict]):
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(v) for v in row.values()) + " |")


def part(name: str, spec: dict, repeats: int) -> dict:
    found = {"rows": spec["rows"], "batch": spec["batch"], **child(spec, "check")}
    least = found["floor"]
    found |= {"runs": interleaved(spec, repeats)}
    found["summary"] = summary(found["runs"], least["seconds"], spec["batch"])
    print(f"\n{name}: {spec['rows']} rows, {spec['batch']} an update, {repeats} runs each, {spec['dtype']}")
    print(
        f"an update: {least['tokens']} tokens of {least['padded_tokens']} padded, {least['graded']} graded;",
        end=" ",
    )
    print(f"products alone {least['seconds']:.3f} s ({least['gflops_per_second']:.0f} GFLOP/s)")
    print(f"first gradient, float32: {found['gradient difference']:.1e} from TRL's\n")
    table(found["summary"])
    return found


def main(options) -> dict:
    "Runs both parts, prints their tables and writes all numbers to `options.out`."
    from importlib.metadata import version

    from ftnb.data import load
    from ftnb.model import pick_dtype

    dtype = options.dtype if options.dtype != "auto" else str(pick_dtype()).removeprefix("torch.")
    labels = sorted({r.label for r in load(options.data / "banking77/train.jsonl").records})
    listed = SYSTEM + " The intents are: " + ", ".join(labels) + "."
    with tempfile.TemporaryDirectory() as work:
        spec = {"data": str(options.data), "model": options.model, "dtype": dtype, "batch": options.batch}
        spec |= {"seed": 0, "learning_rate": 5e-4, "val": options.val, "out": work}
        found = {"versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")}}
        found |= {"threads": 2, "dtype": dtype, "model": Path(options.model).name}
        short = {**spec, "rows": options.rows, "system": SYSTEM}
        long = {**spec, "rows": options.long_rows, "system": listed, "val": min(16, options.val)}
        parts = [("short", "Banking77", short, options.repeats)]
        if options.long_rows:
            parts.append(("labels in the prompt", "77 labels in the prompt", long, options.long_repeats))
        for key, title, what, repeats in parts:
            found[key] = part(title, what, repeats)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def parsed(args=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FTNB_SHARED") or Path(__file__).resolve().parents[2] / "shared"
    parser.add_argument("--data", type=Path, default=Path(shared) / "data", help="folder with banking77/")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="alias or folder")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=16, help="rows an update, at once")
    parser.add_argument("--rows", type=int, default=128, help="training rows of the short prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--long-rows", type=int, default=48, help="with the labels in the prompt; 0: leave it out"
    )
    parser.add_argument("--long-repeats", type=int, default=1)
    parser.add_argument("--val", type=int, default=VAL, help="validation rows")
    parser.add_argument("--quick", action="store_true", help="48 rows, once, short prompt only")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(args)
    if options.quick:
        options.rows, options.repeats, options.long_rows, options.val = 48, 1, 0, 16
    return options


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        import logging
        import warnings

        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        print(json.dumps({"run": run, "check": check}[sys.argv[2]](json.loads(sys.argv[3]))))
    else:
        main(parsed())
