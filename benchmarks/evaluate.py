"""Evaluation speed with the same answers: ftnb beside lm-eval's hf backend and transformers' pipeline, in float32.

    python benchmarks/evaluate.py [--data DIR] [--out FILE] [--work DIR] [--rows 10] [--long-rows 2] [--arc-rows 240]
        [--texts 48] [--only labels,arc,texts] [--quick]

Needs `pip install lm-eval==0.4.13`. DIR holds banking77/test.jsonl and arc_easy/test.jsonl. Three comparisons on the
default model: all 77 labels of Banking77 after each message, with a short prompt and with the labels in the prompt;
lm-eval's own arc_easy task, item by item; greedy answers. The ways take turns within a part. Finished parts are kept
in --work, so a run that was stopped goes on where it was. Prints Markdown tables; --out writes the numbers as JSON.
"""

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
import warnings
from functools import cache, partial
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
from parts import gathered  # noqa: E402

from ftnb.data import load, store_records  # noqa: E402
from ftnb.evaluate import task_prompt  # noqa: E402
from ftnb.forgetting import answered, likelihoods, read_questions  # noqa: E402
from ftnb.format import messages_for, prompt_for, render, stop_ids  # noqa: E402
from ftnb.model import generate, load_model, load_tokenizer, quiet  # noqa: E402
from ftnb.plan import cache_dir, write_text  # noqa: E402
from ftnb.scoring import best_label, greedy_label, label_trie, score_labels  # noqa: E402

SYSTEM = "Classify the customer message into one intent."
BATCHES = {"short": (4, 16, 64), "long": (1, 4, 16)}  # lm-eval's batch sizes to choose from
EACH = 5  # rows of one part


@cache
def loaded(name):
    return load_model(name, "float32"), load_tokenizer(name)


@cache
def harness(name):
    here = Path(__file__).resolve().parent  # lm-eval imports a package that is named as this file
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != here]
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = loaded(name)
    with quiet():
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device=str(model.device))


def timed(work):
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def clocked(clock, work, *args, **more):
    seconds, found = timed(partial(work, *args, **more))
    clock.append(seconds)
    return found


# Banking77: all labels after each message


def messages(args, kind, n, skip=0):
    "Prompts, and the trie of the 77 labels."
    tokenizer = loaded(args.model)[1]
    records = list(load(args.data / "banking77/test.jsonl").records)
    labels = sorted({r.completion for r in records})
    random.Random(0).shuffle(records)
    system = SYSTEM if kind == "short" else f"{SYSTEM} The intents are: {', '.join(labels)}."
    prompts = [prompt_for(tokenizer, r, system) for r in records[skip : skip + n]]
    return prompts, label_trie(tokenizer, labels)


def by_lm_eval(args, prompts, rows, batch):
    "Log p of each row of tokens after each prompt, and whether it is what greedy decoding writes."
    lm = harness(args.model)
    lm.batch_size_per_gpu = batch
    asked = [(("", ""), prompt, list(row)) for prompt in prompts for row in rows]
    found = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    return np.array([p for p, _ in found]).reshape(len(prompts), len(rows))


def best_batch(args, kind):
    "Seconds of lm-eval for the same few requests at several batch sizes."
    prompts, trie = messages(args, kind, 1)
    rows = trie.rows[:: 1 if kind == "short" else 8]
    return {str(b): timed(partial(by_lm_eval, args, prompts, rows, b))[0] for b in BATCHES[kind]}


def labels_part(args, kind, start, n, batches):
    model, tokenizer = loaded(args.model)
    prompts, trie = messages(args, kind, n, start)
    ask = partial(by_lm_eval, args, prompts, trie.rows)
    ways = {f"lm-eval, batch {b}": partial(ask, b) for b in batches} | our_ways(
        model, tokenizer, prompts, trie
    )
    found = {name: timed(work) for name, work in ways.items()}
    return {"n": n, "seconds": {k: t for k, (t, _) in found.items()}} | compared(
        trie, {k: v for k, (_, v) in found.items()}
    )


def our_ways(model, tokenizer, prompts, trie):
    ask = {"model": model, "tokenizer": tokenizer, "prompts": prompts, "labels": trie, "progress": False}
    return {
        "ftnb, all labels": partial(score_labels, **ask),
        "ftnb, likeliest": partial(best_label, **ask),
        "ftnb, greedy": partial(greedy_label, **ask),
    }


def compared(trie, found):
    "Differences from lm-eval, over all rows and labels."
    scores, best = found["ftnb, all labels"], found["ftnb, likeliest"]
    theirs = [v for k, v in found.items() if k.startswith("lm-eval")]
    top = scores.argmax(1)
    made = {"likeliest is argmax": [trie.labels[k] == label for k, (label, _) in zip(top, best)]}
    if theirs:
        apart, rows = abs(theirs[0] - scores), np.arange(len(scores))
        made |= {"same argmax": (theirs[0].argmax(1) == top).tolist()}
        made |= {"difference": float(apart.max()), "lowest": float(scores.min())}
        made |= {
            "of the likeliest": float(apart[rows, top].max()),
            "relative": float((apart / abs(scores)).max()),
        }
        made |= {"within 1e-4": int((apart <= 1e-4).sum())}
        made |= {"lm-eval from itself": float(max(abs(a - theirs[0]).max() for a in theirs))}
    return made


def ours_alone(args, kind, n):
    "Our ways on more rows than lm-eval can be asked in the time, for the seconds a row."
    model, tokenizer = loaded(args.model)
    prompts, trie = messages(args, kind, n)
    return {"n": n, "seconds": {k: timed(w)[0] for k, w in our_ways(model, tokenizer, prompts, trie).items()}}


def in_float64(args, kind):
    "How far both are from the same sums in float64, on one message."
    model, tokenizer = loaded(args.model)
    prompts, trie = messages(args, kind, 1)
    ours, theirs = score_labels(model, tokenizer, prompts, trie), by_lm_eval(args, prompts, trie.rows, 16)
    exact = score_labels(model.double(), tokenizer, prompts, trie)
    model.float()
    return {"ours": float(abs(ours - exact).max()), "lm-eval": float(abs(theirs - exact).max())}


def label_parts(args):
    for kind, n in (("short", args.rows), ("long", args.long_rows)):
        if not n:
            continue
        yield f"{kind} batch", partial(best_batch, args, kind)
        for start in range(0, n, EACH):
            yield f"{kind} {start}", partial(chosen_part, args, kind, start, min(EACH, n - start))
        yield f"{kind} ours", partial(ours_alone, args, kind, args.ours)
    if args.rows:
        yield "float64", partial(in_float64, args, "short")


def chosen_part(args, kind, start, n):
    times = json.loads((args.work / f"{kind}-batch.json").read_text())
    best = int(min(times, key=times.get))
    return labels_part(args, kind, start, n, sorted({best, 1} if kind == "short" else {best}))


# ARC-Easy: lm-eval's task on the local file


def arc_task(args, folder):
    "The installed task's own lines, with the local file in place of the hub's."
    import lm_eval

    lines = (Path(lm_eval.__file__).parent / "tasks/arc/arc_easy.yaml").read_text().splitlines()
    drop = ("tag", "  - ai2_arc", "task:", "dataset_", "training_split", "validation_split")
    rows = [json.loads(line) for line in (args.data / "arc_easy/test.jsonl").read_text("utf-8").splitlines()]
    kept = {q.id for q in arc_questions(args)}
    shaped = [r | {"choices": {k: [c[k] for c in r["choices"]] for k in ("text", "label")}} for r in rows]
    write_text(folder / "test.jsonl", "".join(json.dumps(r) + "\n" for r in shaped if r["id"] in kept))
    own = [
        "task: arc_easy_local",
        "dataset_path: json",
        "dataset_kwargs:",
        f"  cache_dir: {folder / 'cache'}",
    ]
    own += ["  data_files:", f"    test: {folder / 'test.jsonl'}"]
    write_text(
        folder / "arc_easy_local.yaml", "\n".join(own + [x for x in lines if not x.startswith(drop)]) + "\n"
    )


def arc_questions(args):
    return read_questions(args.data / "arc_easy/test.jsonl", n=args.arc_rows)


def arc_lm_eval(args):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder, quiet():
        arc_task(args, Path(folder))
        lm = harness(args.model)
        lm.batch_size_per_gpu = 16
        tasks = TaskManager(include_path=folder, include_defaults=False)
        ask = {"model": lm, "tasks": ["arc_easy_local"], "task_manager": tasks, "bootstrap_iters": 0}
        clock, usual = [], lm.loglikelihood
        lm.loglikelihood = lambda requests, **more: clocked(clock, usual, requests, **more)
        made = simple_evaluate(**ask, log_samples=True)
        del lm.loglikelihood
    found = made["results"]["arc_easy_local"]
    rows = {s["doc"]["id"]: s for s in made["samples"]["arc_easy_local"]}
    sums = {k: [float(r[0]) for r in s["filtered_resps"]] for k, s in rows.items()}
    right = {by: {k: bool(s[by]) for k, s in rows.items()} for by in ("acc", "acc_norm")}
    return {"seconds": sum(clock), "sums": sums, **right, "told": [found["acc,none"], found["acc_norm,none"]]}


def arc_ours(args):
    model, tokenizer = loaded(args.model)
    questions = arc_questions(args)
    seconds, sums = timed(lambda: likelihoods(model, tokenizer, questions))
    names, rules = [q.id for q in questions], {"acc": "likelihood", "acc_norm": "character"}
    right = {name: dict(zip(names, answered(sums, questions, by))) for name, by in rules.items()}
    return {"seconds": seconds, "sums": dict(zip(names, sums)), **right}


# Greedy answers


def texts_prompts(args):
    _, tokenizer = loaded(args.model)
    records = store_records()
    system, drawn = task_prompt(records, "extraction"), random.Random(0).sample(records, args.texts)
    return [prompt_for(tokenizer, r, system) for r in drawn], [
        render(tokenizer, messages_for(r, system)) for r in drawn
    ]


def texts_part(args, way, batch):
    model, tokenizer = loaded(args.model)
    prompts, texts = texts_prompts(args)
    if way == "ftnb":
        ask = partial(generate, model, tokenizer, prompts, args.new_tokens, batch, False)
        seconds, found = timed(ask)
        return {"seconds": seconds, "texts": [g.text for g in found]}
    from transformers import pipeline

    assert [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts] == prompts
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    ask = {
        "max_new_tokens": args.new_tokens,
        "do_sample": False,
        "return_full_text": False,
        "batch_size": batch,
    }
    with quiet():
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        seconds, found = timed(lambda: pipe(texts, **ask, eos_token_id=stop_ids(tokenizer)))
    tokenizer.padding_side = side
    return {"seconds": seconds, "texts": [f[0]["generated_text"] for f in found]}


# All of them


def parts(args):
    if "labels" in args.only:
        yield from label_parts(args)
    if "arc" in args.only and args.arc_rows != -1:
        yield "arc ours", partial(arc_ours, args)
        yield "arc lm-eval", partial(arc_lm_eval, args)
    if "texts" in args.only and args.texts:
        for way, batch in (("pipeline", 1), ("pipeline", 16), ("ftnb", 16), ("ftnb", 1)):
            yield f"texts {way} {batch}", partial(texts_part, args, way, batch)


def table(rows):
    print("\n| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(v) for v in row.values()) + " |")


def label_table(results, kind):
    told = [v for k, v in results.items() if k.startswith(kind) and k.split()[1].isdigit()]
    ours = results.get(f"{kind} ours")
    if not told or not ours:
        return None
    n, rows = sum(p["n"] for p in told), []
    for name in told[0]["seconds"]:
        own = name.startswith("ftnb")
        each = ours["seconds"][name] / ours["n"] if own else sum(p["seconds"][name] for p in told) / n
        rows.append({"way": name, "n": ours["n"] if own else n, "s a message": each})
    peers = [r["s a message"] for r in rows if not r["way"].startswith("ftnb")]
    for row in rows:
        row["x lm-eval's best"] = f"{min(peers) / row['s a message']:.1f}"
        row["s a message"] = f"{row['s a message']:.3f}"
    title = "short prompt" if kind == "short" else "77 labels in the prompt"
    print(f"\nBanking77, 77 labels after each message, {title}; lm-eval's batch sizes tried:", end=" ")
    print(", ".join(f"{b}: {t:.1f} s" for b, t in results[f"{kind} batch"].items()))
    table(rows)
    same = [s for p in told for s in p["same argmax"]]
    far = {
        k: max(p[k] for p in told)
        for k in ("difference", "of the likeliest", "relative", "lm-eval from itself")
    }
    near, low = sum(p["within 1e-4"] for p in told), min(p["lowest"] for p in told)
    print(
        f"\nSame argmax on {sum(same)} of {len(same)} messages. Largest difference in log p: likeliest label",
        end=" ",
    )
    print(
        f"{far['of the likeliest']:.1e}, any label {far['difference']:.1e} (the lowest log p is {low:.0f}),",
        end=" ",
    )
    print(f"relative {far['relative']:.1e}; {near:,} of {len(same) * 77:,} within 1e-4.", end=" ")
    print(f"lm-eval between its batch sizes: {far['lm-eval from itself']:.1e}.")
    best = [s for p in told for s in p["likeliest is argmax"]]
    print(f"The search for the likeliest finds the argmax on {sum(best)} of {len(best)}.")
    return rows


def arc_table(ours, theirs):
    ids = list(ours["sums"])
    rows = []
    for by, told in zip(("acc", "acc_norm"), theirs["told"]):
        same = sum(ours[by][i] == theirs[by][i] for i in ids)
        rows.append(
            {"metric": by, "lm-eval": f"{told:.4f}", "ftnb": f"{np.mean([ours[by][i] for i in ids]):.4f}"}
        )
        rows[-1] |= {"same item by item": f"{same} of {len(ids)}"}
    print("\nARC-Easy test, lm-eval's task on the local file:")
    table(rows)
    far = max(abs(a - b) for i in ids for a, b in zip(ours["sums"][i], theirs["sums"][i], strict=True))
    print(f"\nLargest difference in log p: {far:.1e}. Seconds: lm-eval (batch 16)", end=" ")
    print(
        f"{theirs['seconds']:.1f}, ftnb {ours['seconds']:.1f}: {theirs['seconds'] / ours['seconds']:.1f} times."
    )
    return rows


def texts_table(results):
    found = {k.removeprefix("texts "): v for k, v in results.items() if k.startswith("texts ")}
    base, rows = found["pipeline 1"], []
    for name, made in found.items():
        same = sum(a == b for a, b in zip(made["texts"], base["texts"], strict=True))
        rows.append(
            {"way": name.replace(" ", ", batch "), "n": len(base["texts"]), "s": f"{made['seconds']:.1f}"}
        )
        rows[-1] |= {"x pipeline, batch 1": f"{base['seconds'] / made['seconds']:.1f}", "same text": same}
    print("\nGreedy answers to the store's messages, instructions in the prompt:")
    table(rows)
    return rows


def main(args):
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    results = gathered(parts(args), args.work)
    made = {"model": args.model, "threads": args.threads, "parts": results}
    made |= {kind: label_table(results, kind) for kind in ("short", "long") if f"{kind} ours" in results}
    if "float64" in results:
        far = results["float64"]
        print(f"\nFrom float64, one message: ftnb {far['ours']:.1e}, lm-eval {far['lm-eval']:.1e}.")
    if "arc lm-eval" in results:
        made["arc"] = arc_table(results["arc ours"], results["arc lm-eval"])
    if "texts ftnb 1" in results:
        made["texts"] = texts_table(results)
    if args.out:
        write_text(args.out, json.dumps(made, indent=1) + "\n")
    return made


def parsed(words=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = os.environ.get("FTNB_SHARED") or Path(__file__).resolve().parents[2] / "shared"
    parser.add_argument(
        "--data", type=Path, default=Path(shared) / "data", help="folder with the two data sets"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--work", type=Path, help="folder for finished parts")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="alias or folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="labels,arc,texts", help="comparisons to make")
    parser.add_argument("--rows", type=int, default=10, help="messages with the short prompt, for lm-eval")
    parser.add_argument("--long-rows", type=int, default=2, help="messages with the labels in the prompt")
    parser.add_argument("--ours", type=int, default=16, help="messages on which our own seconds are taken")
    parser.add_argument("--arc-rows", type=int, default=240, help="questions; 0: all of the test file")
    parser.add_argument("--texts", type=int, default=48, help="messages to answer")
    parser.add_argument("--new-tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--quick", action="store_true", help="a message or two of everything")
    args = parser.parse_args(words)
    if args.quick:
        args.rows, args.long_rows, args.ours, args.arc_rows, args.texts, args.new_tokens = 1, 0, 2, 8, 4, 4
    names = [
        args.rows,
        args.long_rows,
        args.ours,
        args.arc_rows,
        args.texts,
        args.new_tokens,
        Path(args.model).name,
    ]
    args.work = args.work or cache_dir() / "benchmark-evaluate" / "-".join(map(str, names))
    return args


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    options = parsed()
    wanted = ("banking77/test.jsonl", "arc_easy/test.jsonl")
    if missing := [name for name in wanted if not (options.data / name).is_file()]:
        sys.exit(f"no {', '.join(missing)} in {options.data}")
    main(options)
