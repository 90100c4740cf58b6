"""The certificate of a finished run's exports, and the guide's two claims on merging and on 4 bits.

    python benchmarks/certify.py RUN [--n 168] [--repeats 3] [--rounds 7] [--work DIR] [--out FILE] [--quick]

Exports every kind into --work, holds each against the run, takes time and memory in fresh processes, then times adapter
and merged, and the GGUF types, in turns within each round: a ratio and its interval come from the rounds. About a
quarter of an hour on two cores. Finished parts are kept in --work. RUN gets a `golden.json` of --n answers. Prints
Markdown tables; --out writes the same numbers as JSON. Nothing else may run while --parts time does.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from parts import gathered
from scipy.stats import t as student

from ftnb.certify import Agreement, footprint, recommend, verify
from ftnb.deploy import KINDS, Artifact, export, tensor_types
from ftnb.engine import load_for_generation
from ftnb.format import prompt_for
from ftnb.model import load_tokenizer
from ftnb.plan import write_text
from ftnb.train import Run

BITS_7B = 4.9  # a weight in Q4_K_M, as llama.cpp's table of types gives for a model of that size
READING = 5.0  # tokens a second that a person reads, about 230 words a minute
SLIGHT = 1.1  # a delay of up to a tenth


def certificate(place, run, n):
    return asdict(verify(Artifact.load(place), run, n, repeats=0))


def prompts_of(run, n):
    tokenizer = load_tokenizer(run.adapter_dir)
    return [prompt_for(tokenizer, r, run.recipe.system) for r in run.splits.test[:n]]


def cost(place, run, repeats):
    return footprint(Artifact.load(place), prompts_of(run, 8), run.recipe.max_new_tokens, repeats)


def timed(engine, prompts, limit):
    "Median milliseconds to the first token and for each later one."
    first, later = [], []
    for ids in prompts:
        begun = time.perf_counter()
        for i, _ in enumerate(engine.stream(ids, limit)):
            now = time.perf_counter()
            (later if i else first).append(1000 * (now - begun))
            begun = now
    return statistics.median(first), statistics.median(later)


def rounds_of(places, run, rounds, prompts_each=4, limit=48):
    "kind -> first and later milliseconds of each round; the kinds take turns, the first round warms up."
    engines = {p.name: load_for_generation(Artifact.load(p)) for p in places}
    prompts = prompts_of(run, prompts_each)
    found = {k: {"first_ms": [], "per_token_ms": []} for k in engines}
    for i in range(rounds + 1):
        for k in list(engines)[:: 1 if i % 2 else -1]:
            first, later = timed(engines[k], prompts, limit)
            if i:
                found[k]["first_ms"].append(first)
                found[k]["per_token_ms"].append(later)
    for engine in engines.values():
        engine.close()
    return found | {"prompt_tokens": statistics.median(map(len, prompts))}


def mean_interval(values, back=lambda x: x):
    "Mean over rounds with its 95% t interval."
    values = np.asarray(values)
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    mean = values.mean()
    return {
        "value": float(back(mean)),
        "low": float(back(mean - half)),
        "high": float(back(mean + half)),
        "n": len(values),
    }


def ratio(a, b):
    return mean_interval(np.log(np.asarray(a) / np.asarray(b)), np.exp)


def bandwidth(size=1 << 30, times=8):
    "Bytes a second that all cores read from memory, best of some passes over a gigabyte."
    x, best = torch.ones(size // 4), float("inf")
    for _ in range(times):
        begun = time.perf_counter()
        x.sum()
        best = min(best, time.perf_counter() - begun)
    return size / best


def speeds(turns, sizes):
    found = {}
    for kind, taken in turns.items():
        if kind == "prompt_tokens":
            continue
        per = mean_interval(1000 / np.asarray(taken["per_token_ms"]))
        found[kind] = {"tokens_per_s": per, "bytes_per_s": per["value"] * sizes[kind]}
    return found


def projection(speed, size, params, first_ms, bytes_per_s):
    "Tokens a second of 7 billion parameters at 4 bits: bounded above by memory alone, below by our own pace scaled."
    weights = 7e9 * BITS_7B / 8
    scale = 7e9 / params
    return {
        "bytes_per_token": weights,
        "most": bytes_per_s / weights,
        "least": speed / scale,
        "first_token_s": first_ms * scale / 1000,
        "scale": scale,
        "our_bytes_per_token": size,
    }


def words(r, digits=2):
    return f"{r['value']:.{digits}f} ({r['low']:.{digits}f} to {r['high']:.{digits}f}, n = {r['n']} rounds)"


def verdicts(made):
    pairs, seven, model = made["ratios"], made["projection"], "135M parameters, 2 threads"
    model = f"{made['params'] / 1e6:.0f}M parameters, {made['cores']} cores"
    merge, disk = pairs["adapter / merged"], made["sizes"]
    faster = "holds" if merge["low"] > 1 else "fails here" if merge["high"] < 1 else "depends"
    slight = "holds" if merge["high"] <= SLIGHT else "fails here" if merge["low"] > SLIGHT else "depends"
    q4 = made["speeds"]["gguf-q4_k_m"]["tokens_per_s"]
    seven_b = "holds" if seven["least"] >= READING else "fails here" if seven["most"] < READING else "depends"
    smaller = pairs["gguf-f16 / gguf-q4_k_m"]
    cheaper = "holds" if smaller["low"] > 1 else "fails here" if smaller["high"] < 1 else "depends"
    rows = [
        (
            "merging answers faster than the adapter beside its base",
            faster,
            f"time a token, adapter / merged: {words(merge)}; in transformers, float32, {model}",
        ),
        (
            "the unmerged adapter adds slight latency",
            slight,
            f"{100 * (merge['value'] - 1):.0f} % more a token; slight is taken as at most {100 * (SLIGHT - 1):.0f} %; "
            f"first token {words(pairs['adapter / merged, first token'])}; {model}",
        ),
        (
            "merging costs storage",
            "holds" if disk["merged"] > disk["adapter"] else "fails here",
            f"{disk['merged'] / 1e6:,.0f} MB against {disk['adapter'] / 1e6:,.0f} MB beside the base",
        ),
        (
            "4 bits make answers cheaper than 16",
            cheaper,
            f"time a token, F16 / Q4_K_M: {words(smaller)}; {disk['gguf-q4_k_m'] / 1e6:,.0f} against "
            f"{disk['gguf-f16'] / 1e6:,.0f} MB; llama.cpp, {model}",
        ),
        (
            "a 7B model at 4 bits runs well on a CPU",
            seven_b,
            f"measured: Q4_K_M of {model}: {words(q4, 0)} tokens/s. Projected, not measured, to 7B: {seven['least']:.1f} to "
            f"{seven['most']:.1f} tokens/s and {seven['first_token_s']:.0f} s to the first token; a reader takes {READING:.0f} tokens/s",
        ),
    ]
    if (lora := pairs.get("gguf-lora / gguf-f16")) is not None:
        held = "holds" if lora["high"] <= SLIGHT else "fails here" if lora["low"] > SLIGHT else "depends"
        rows.insert(
            2,
            (
                "the same in llama.cpp: an adapter file over a base file",
                held,
                f"time a token, adapter / F16: {words(lora)}; {model}",
            ),
        )
    return [{"claim": a, "verdict": b, "evidence": c} for a, b, c in rows]


def paired(turns):
    "Ratios of kinds that took turns."
    found = {}
    for a, b in (
        ("adapter", "merged"),
        ("gguf-f16", "gguf-q8_0"),
        ("gguf-f16", "gguf-q4_k_m"),
        ("gguf-lora", "gguf-f16"),
    ):
        for held in turns.values():
            if a in held and b in held:
                found[f"{a} / {b}"] = ratio(held[a]["per_token_ms"], held[b]["per_token_ms"])
                found[f"{a} / {b}, first token"] = ratio(held[a]["first_ms"], held[b]["first_ms"])
    return found


def table(head, rows):
    return "\n".join(["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows)]) + "\n"


def measured(run, work, a):
    for kind in KINDS:
        if not (work / "exports" / kind / "manifest.json").is_file():
            export(run, work / "exports", (kind,))
    places = {kind: work / "exports" / kind for kind in KINDS}
    ggufs = [p for kind, p in places.items() if kind.startswith("gguf")]
    clock = [(f"{kind} alone", lambda kind=kind: cost(places[kind], run, a.repeats)) for kind in KINDS]
    clock += [
        ("torch in turns", lambda: rounds_of([places["adapter"], places["merged"]], run, a.rounds)),
        ("gguf in turns", lambda: rounds_of(ggufs, run, a.rounds)),
        ("bandwidth", bandwidth),
    ]
    answers = [(kind, lambda kind=kind: certificate(places[kind], run, a.n)) for kind in a.kinds.split(",")]
    return gathered({"all": clock + answers, "time": clock, "answers": answers}[a.parts], work)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path)
    p.add_argument("--n", type=int, default=168)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--work", type=Path)
    p.add_argument("--out", type=Path)
    p.add_argument("--parts", choices=("all", "time", "answers"), default="all")
    p.add_argument("--kinds", default=",".join(KINDS), help="of which --parts answers asks")
    p.add_argument("--quick", action="store_true", help="8 prompts, one process, two rounds")
    a = p.parse_args()
    if a.quick:
        a.n, a.repeats, a.rounds = 8, 1, 2
    run, work = Run.load(a.run), a.work or Path(tempfile.mkdtemp())
    got = measured(run, work, a)
    if a.parts != "all":
        return
    found = [Agreement.from_table(got[kind] | got[f"{kind} alone"]) for kind in KINDS]
    turns = {name: got[name] for name in ("torch in turns", "gguf in turns")}
    sizes = {x.kind: x.size for x in found}
    weights = {k: (work / "exports" / k / "model.gguf") for k in KINDS}
    weights = {k: p.stat().st_size for k, p in weights.items() if p.is_file()}
    params = (work / "exports" / "merged" / "model.safetensors").stat().st_size / 2  # bfloat16
    ggufs = speeds(
        {k: v for k, v in turns["gguf in turns"].items() if k in weights or k == "prompt_tokens"}, weights
    )
    q4 = turns["gguf in turns"]["gguf-q4_k_m"]
    made = {
        "model": run.recipe.model,
        "note": "exports of a 135M model whose base was rounded to 4 bits before training",
        "params": params,
        "cores": len(os.sched_getaffinity(0)),
        "n": found[0].n,
        "agreements": [asdict(x) for x in found],
        "recommendation": recommend(found),
        "types": {k: tensor_types(work / "exports" / k / "model.gguf") for k in weights},
        "sizes": sizes,
        "prompt_tokens": q4 and turns["gguf in turns"]["prompt_tokens"],
        "ratios": paired(turns),
        "speeds": ggufs | speeds(turns["torch in turns"], {"adapter": 4 * params, "merged": 4 * params}),
        "bandwidth": got["bandwidth"],
    }
    speed = made["speeds"]["gguf-q4_k_m"]["tokens_per_s"]["value"]
    first = statistics.median(q4["first_ms"])
    made["projection"] = projection(speed, weights["gguf-q4_k_m"], params, first, got["bandwidth"])
    made["verdicts"] = verdicts(made)
    rows = [
        (str(x.kind), f"{x.kl.value:.2g}", f"{x.kl_max:.2g}", f"{x.same}/{x.n}", f"{x.per_token_ms:.1f}")
        for x in found
    ]
    print(table(("export", "KL", "worst", "same", "ms a token"), rows))
    print(table(("claim", "verdict", "evidence"), [tuple(v.values()) for v in made["verdicts"]]))
    print(made["recommendation"])
    if a.out:
        write_text(a.out, json.dumps(made, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
