"""Tuning beside context in a 2x2 on PubMedQA, with the default model: does it read, does it know when it is sure?

    python benchmarks/grounding.py [--data DIR] [--out FILE] [--work DIR] [--budget SECONDS] [--quick]

Two cores are enough: about 12 minutes, in parts. Finished parts are kept in --work, so a run that was stopped, or that
stopped at --budget, goes on where it was. Prints the comparisons; --out writes the likelihood of every answer to every
test question, from which `ftnb.grounding.read_grounding` makes numbers, intervals and figures. DIR holds
pubmedqa/train.jsonl and pubmedqa/test.jsonl, and arc_easy/test.jsonl, which is asked before and after. Needs bm25s.
"""

import json
import logging
import random
import re
import time
import warnings
from collections import Counter
from functools import cache, partial
from importlib.metadata import version

import torch
from parts import gathered, parser, placed

from ftnb.data import Record, Splits
from ftnb.evaluate import Prediction
from ftnb.forgetting import knowledge, read_questions
from ftnb.grounding import (
    comparisons,
    label_sums,
    read_grounding,
    swapped,
    unsupported,
    whole_sentences,
    with_context,
)
from ftnb.metrics import values_in
from ftnb.model import load_model, load_tokenizer
from ftnb.plan import Recipe, write_text
from ftnb.train import load_run, train

warnings.simplefilter("ignore", FutureWarning)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
LABELS, DTYPE = ("yes", "no", "maybe"), "bfloat16"
RECIPE = Recipe(
    name="pubmedqa",
    task="classification",
    system="Answer the question about medical research with one word: yes, no or maybe.",
    learning_rate=1e-3,
    batch_size=16,
    accumulation=1,
    epochs=2.0,
    evals_per_epoch=1,
    early_stopping=0,
    max_new_tokens=4,
    max_length=512,
    dtype=DTYPE,
)
BUDGET = 160  # tokens of an abstract, whole sentences from its end: there the results stand


def sizes(quick):
    "Training rows, validation rows, test rows, questions of general knowledge."
    return (24, 8, 16, 16) if quick else (350, 50, 500, 300)


@cache
def papers(data, side):
    lines = (data / f"pubmedqa/{side}.jsonl").read_text("utf-8").split("\n")  # U+2029 stands inside a row
    return [json.loads(line) for line in lines if line]


def record(paper):
    turns = ({"role": "user", "content": paper["question"]},)
    return Record(paper["pmid"], turns, paper["final_decision"], paper["final_decision"])


def abstract(paper):
    return " ".join(paper["contexts"])


@cache
def cut(data, side):
    tokenizer = load_tokenizer(RECIPE.model)
    return [whole_sentences(tokenizer, abstract(p), BUDGET) for p in papers(data, side)]


def tests(args):
    "Test papers and their places in the file."
    n = sizes(args.quick)[2]
    return list(enumerate(papers(args.data, "test")))[:n]


def trained(args, told):
    "A run on questions with or without their abstracts, the same rows in the same order."
    n, n_val, *_ = sizes(args.quick)
    order = random.Random(0).sample(range(500), n + n_val)
    texts, rows = cut(args.data, "train"), papers(args.data, "train")
    made = [with_context(record(rows[i]), texts[i].text if told else "") for i in order]
    splits = Splits(made[:n], made[n:], [record(p) for _, p in tests(args)])
    recipe = RECIPE.replace(epochs=1.0) if args.quick else RECIPE
    out = args.work / ("run-with" if told else "run-without")
    return train(recipe, splits, out, max_answers=n_val)


def asked(args):
    return read_questions(args.data / "arc_easy/test.jsonl", n=sizes(args.quick)[3])


def found(args):
    "For each test question, the places of the five abstracts that BM25 ranks first, of all 1,000."
    import bm25s

    every = [abstract(p) for side in ("test", "train") for p in papers(args.data, side)]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(every, stopwords="en", show_progress=False), show_progress=False)
    questions = bm25s.tokenize([p["question"] for _, p in tests(args)], stopwords="en", show_progress=False)
    places, _ = index.retrieve(questions, k=5, show_progress=False)
    return [[int(i) for i in row] for row in places]


def contexts(args, kind):
    own = [cut(args.data, "test")[i].text for i, _ in tests(args)]
    if kind == "found":
        every = cut(args.data, "test") + cut(args.data, "train")
        return [every[row[0]].text for row in found(args)]
    return {"own": own, "swapped": swapped(own), "none": [""] * len(own)}[kind]


def scored(args, model, tokenizer, kind):
    rows = [
        with_context(record(p), text) for (_, p), text in zip(tests(args), contexts(args, kind), strict=True)
    ]
    sums = label_sums(model, tokenizer, rows, LABELS, RECIPE.system)
    return [[round(x, 3) for x in row] for row in sums]


def bits(right):
    return "".join("01"[bool(r)] for r in right)


def base(args, kind):
    return scored(args, load_model(RECIPE.model, DTYPE).eval(), load_tokenizer(RECIPE.model), kind)


def tuned(args, told, kind):
    return scored(args, *load_run(trained(args, told), DTYPE), kind)


def fitted(args, told):
    start = time.perf_counter()
    run = trained(args, told)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "steps": run.metrics["steps"],
        "best": run.best_step,
    }


def known(args, told):
    model = (load_model(RECIPE.model, DTYPE), load_tokenizer(RECIPE.model))
    model = model if told is None else load_run(trained(args, told), DTYPE)
    return bits(knowledge(*model, asked(args)))


def planted(rng, texts, i):
    "A sentence of paper i as it stands, and with one change of each kind that fits it."
    sentences = [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", texts[i]) if len(s.split()) > 6]
    if not sentences:
        return
    yield "true: a sentence of the abstract", rng.choice(sentences)
    held = {v.key for v in values_in(texts[i])}
    for sentence in rng.sample(sentences, len(sentences)):
        digits = [m for m in re.finditer(r"(?<![\w.,])\d+(?![\w.,]*[a-zA-Z])", sentence)]
        for n in (rng.randrange(2, 999) for _ in range(20)) if digits else ():
            m = digits[0]
            changed = sentence[: m.start()] + str(n) + sentence[m.end() :]
            if {v.key for v in values_in(changed)} - held:
                yield "a number changed", changed
                break
        else:
            continue
        break
    other = rng.choice([t for k, t in enumerate(texts) if k != i])
    names = [m for m in re.finditer(r"(?<=[a-z,] )[A-Z][A-Za-z]{3,}\b", other) if m[0] not in texts[i]]
    places = [(s, m) for s in sentences for m in re.finditer(r"(?<=[a-z,] )[A-Za-z]{5,}\b", s)]
    if names and places:
        sentence, m = rng.choice(places)
        yield (
            "a word replaced by another paper's name",
            sentence[: m.start()] + rng.choice(names)[0] + sentence[m.end() :],
        )
    denied = [s for s in sentences if re.search(r" (?:was|were|is|are) (?!not)", s)]
    if denied:
        yield "denied", re.sub(r" (was|were|is|are) ", r" \1 not ", rng.choice(denied), count=1)
    strange = [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", other) if len(s.split()) > 6]
    if strange:
        yield "a sentence of another paper", rng.choice(strange)


def check(args):
    "Texts flagged by `unsupported`, also without its phrases, of all: true ones, and those with a planted change."
    rng, rows, counts = random.Random(0), [p for _, p in tests(args)], {}
    texts = [abstract(p) for p in rows]
    for i, paper in enumerate(rows):
        made = [("true: the authors' conclusion", paper["long_answer"]), *planted(rng, texts, i)]
        for kind, text in made:
            found = unsupported(Prediction(paper["pmid"], paper["question"], "", text), texts[i])
            hits, hard, n = counts.get(kind, (0, 0, 0))
            counts[kind] = (hits + bool(found), hard + any(u.kind != "phrase" for u in found), n + 1)
    return {kind: counts[kind] for kind in sorted(counts, key=lambda k: (not k.startswith("true"), k))}


CELLS = {  # name -> trained with abstracts (None: not trained), context it is asked with
    "base": (None, "none"),
    "base+own": (None, "own"),
    "base+found": (None, "found"),
    "tuned": (False, "none"),
    "tuned+own": (True, "own"),
    "tuned+found": (True, "found"),
    "tuned+swapped": (True, "swapped"),
    "tuned+none": (True, "none"),
}


def parts(args):
    yield "check", partial(check, args)
    yield "found", partial(found, args)
    yield "known before", partial(known, args, None)
    for told, name in ((False, "without"), (True, "with")):
        yield f"train {name}", partial(fitted, args, told)
        yield f"known {name}", partial(known, args, told)
    for name, (told, kind) in CELLS.items():
        make = partial(base, args, kind) if told is None else partial(tuned, args, told, kind)
        yield f"cell {name}", make


def facts(args, results):
    n, _, n_test, _ = sizes(args.quick)
    own, places = cut(args.data, "test"), [i for i, _ in tests(args)]
    cuts = [own[i] for i in places]
    ranks = results["found"]
    return {
        "model": RECIPE.model,
        "quick": args.quick,
        "rows": {"train": n, "test": len(places)},
        "context": {
            "budget": BUDGET,
            "cut": sum(c.kept < c.of for c in cuts),
            "empty": sum(not c.text for c in cuts),
            "tokens": round(sum(c.tokens for c in cuts) / len(cuts), 1),
            "sentences kept": sum(c.kept for c in cuts),
            "sentences": sum(c.of for c in cuts),
        },
        "found": {
            "n": len(places),
            "at1": sum(row[0] == i for i, row in zip(places, ranks, strict=True)),
            "at5": sum(i in row for i, row in zip(places, ranks, strict=True)),
        },
        "check": results["check"],
        "recipe": {k: getattr(RECIPE, k) for k in ("learning_rate", "epochs", "r", "alpha", "batch_size")},
        "training": {name: results[f"train {name}"] for name in ("without", "with")},
        "versions": {
            "torch": torch.__version__,
            "bm25s": version("bm25s"),
            "threads": torch.get_num_threads(),
        },
    }


def main(args):
    args.work.mkdir(parents=True, exist_ok=True)
    results = gathered(parts(args), args.work, args.budget, "part-")
    if not all(f"cell {name}" in results for name in CELLS):
        return
    rows = [p for _, p in tests(args)]
    made = {
        "labels": LABELS,
        "expected": "".join(str(LABELS.index(p["final_decision"])) for p in rows),
        "majority": Counter(p["final_decision"] for p in papers(args.data, "train")).most_common(1)[0][0],
        "before": results["known before"],
        "after": {
            "trained on questions alone": results["known without"],
            "trained with abstracts": results["known with"],
        },
        "facts": facts(args, results),
        "sums": {name: results[f"cell {name}"] for name in CELLS},
    }
    file = write_text(args.out or args.work / "grounding.json", json.dumps(made) + "\n")
    measured = read_grounding(file)
    for name in [*CELLS, "majority"]:
        report = measured.report(name)
        print(f"{name}: accuracy {report.metrics['accuracy']}, macro F1 {report.metrics['macro_f1']}")
    print(*comparisons(measured), *measured.known.values(), measured.facts, sep="\n")


if __name__ == "__main__":
    options = parser(__doc__, "pubmedqa/ and arc_easy/", "a few minutes").parse_args()
    main(placed(options, "grounding", "pubmedqa/train.jsonl", "pubmedqa/test.jsonl", "arc_easy/test.jsonl"))
