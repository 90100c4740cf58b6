"""Near-identical texts found by `near_pairs`, by our MinHash tables, and by other tools, on the same rows in one run.

    pip install -r benchmarks/requirements.txt
    python benchmarks/near_duplicates.py --data ../shared/data --out docs/near_duplicates.json

Rows are the training texts of Banking77 and 1,000 seeded edits of them. A row is near-identical if rapidfuzz gives it
0.85 or more with another row; all pairs are scored for that. Each tool runs in a new process, the tools take turns,
and the median of the rounds counts. `--python` names another interpreter for the tools that are not installed here.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOOLS = {  # name -> what runs
    "ftnb near_pairs": "exact",
    "ftnb near_pairs_lsh": "lsh",
    "datasketch MinHashLSH": "datasketch",
    "datasketch MinHashLSH, candidates checked": "datasketch-checked",
    "text-dedup minhash, its defaults": "text-dedup",
    "text-dedup minhash, runs of 2 words, threshold 0.5": "text-dedup-short",
    "semhash on TF-IDF/SVD vectors (not its own encoder)": "semhash",
}
NEAR, PLANTED = 0.85, 1000


def edited(text: str, rng: random.Random) -> str:
    "One slip: a letter, a word lost, a word twice, or two words swapped."
    words = text.split()
    kind = rng.choice(("letter", "lost", "twice", "swapped") if len(words) > 5 else ("letter",))
    at = rng.randrange(len(words) - 1) if len(words) > 1 else 0
    if kind == "letter":
        spot = rng.choice([i for i, c in enumerate(text) if c.isalpha()])
        return (
            text[:spot] + rng.choice("abcdefghijklmnopqrstuvwxyz".replace(text[spot], "")) + text[spot + 1 :]
        )
    if kind == "lost":
        return " ".join(words[:at] + words[at + 1 :])
    if kind == "twice":
        return " ".join([*words[: at + 1], *words[at:]])
    return " ".join([*words[:at], words[at + 1], words[at], *words[at + 2 :]])


def rows(data: Path, seed: int = 0) -> tuple[list[str], list[tuple[int, int]]]:
    "Distinct texts, and the pairs (text, its edit) that were planted."
    from ftnb.data import load, normalise

    rng = random.Random(seed)
    texts = list(dict.fromkeys(normalise(r.text) for r in load(data / "banking77" / "train.jsonl").records))
    known, pairs = set(texts), []
    for i in rng.sample(range(len(texts)), PLANTED):
        text = edited(texts[i], rng)
        if text not in known:
            known.add(text)
            pairs.append((i, len(texts)))
            texts.append(text)
    return texts, pairs


def truth(texts: list[str]) -> list[tuple[int, int]]:
    "Every pair of 0.85 or more: each text scored with each."
    import numpy as np
    from rapidfuzz import fuzz, process

    pairs = []
    for at in range(0, len(texts), 500):
        part = texts[at : at + 500]
        score = process.cdist(
            part, texts, scorer=fuzz.ratio, score_cutoff=100 * NEAR, workers=-1, dtype=np.float32
        )
        i, j = np.nonzero(score)
        pairs += [(int(a) + at, int(b)) for a, b in zip(i, j) if a + at < b]
    return pairs


def _datasketch(texts, checked):
    from datasketch import MinHash, MinHashLSH

    tables, sketches, pairs = MinHashLSH(threshold=0.5 if checked else 0.6, num_perm=128), [], set()
    for n, text in enumerate(texts):
        sketch = MinHash(num_perm=128, seed=1)
        sketch.update_batch([text[i : i + 3].encode() for i in range(max(1, len(text) - 2))])
        tables.insert(n, sketch)
        sketches.append(sketch)
    for n, sketch in enumerate(sketches):
        pairs.update((n, m) for m in tables.query(sketch) if n < m)
    if checked:
        from rapidfuzz import fuzz

        pairs = [(i, j) for i, j in pairs if fuzz.ratio(texts[i], texts[j], score_cutoff=100 * NEAR)]
    return list(pairs)


def _text_dedup(texts, **options):
    import datasets
    from text_dedup import minhash
    from text_dedup.utils import IOArgs, MetaArgs, MinHashArgs

    with tempfile.TemporaryDirectory() as folder:
        datasets.Dataset.from_dict({"text": texts, "row": list(range(len(texts)))}).save_to_disk(
            f"{folder}/in"
        )
        files = IOArgs(path=f"{folder}/in", output=f"{folder}/out", local=True, num_proc=2, clean_cache=False)
        start = time.perf_counter()
        minhash.main.callback(
            io_args=files,
            meta_args=MetaArgs(column="text", idx_column="row"),
            minhash_args=MinHashArgs(**options),
        )
        seconds = time.perf_counter() - start
    return [(minhash.uf.find(n), n) for n in range(len(texts)) if minhash.uf.find(n) != n], seconds


def _semhash(texts, vectors):
    import numpy as np
    from semhash import SemHash

    found = SemHash.from_embeddings(np.load(vectors), texts, model=None).self_deduplicate(NEAR)
    place = {text: n for n, text in enumerate(texts)}
    return [(place[d.duplicate_of], place[d.record]) for d in found.filtered]


def work(tool: str, folder: Path) -> None:
    "Runs one tool in this process and writes its pairs and seconds, imports not counted."
    texts = json.loads((folder / "texts.json").read_text())
    seconds = None
    if tool in ("exact", "lsh"):
        from ftnb.data import near_pairs
        from ftnb.scale import near_pairs_lsh

        call = (
            (lambda: [p[:2] for p in near_pairs(texts)]) if tool == "exact" else lambda: near_pairs_lsh(texts)
        )
        near_pairs_lsh(texts[:2])
    elif tool.startswith("datasketch"):
        import datasketch  # noqa: F401

        def call():
            return _datasketch(texts, tool.endswith("checked"))
    elif tool == "semhash":
        import semhash  # noqa: F401

        def call():
            return _semhash(texts, folder / "vectors.npy")
    else:
        short = dict(ngram=2, min_length=1, threshold=0.5) if tool.endswith("short") else {}
        import text_dedup.minhash  # noqa: F401

        def call():
            return _text_dedup(texts, **short)

    start = time.perf_counter()
    pairs = call()
    seconds = time.perf_counter() - start
    if isinstance(pairs, tuple):
        pairs, seconds = pairs
    (folder / "found.json").write_text(json.dumps({"pairs": pairs, "seconds": seconds}))


def _run(tool, folder, pythons):
    why = ""
    (folder / "found.json").unlink(missing_ok=True)
    for python in pythons:
        command = [python, __file__, "--tool", tool, "--folder", folder]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, cwd=folder)
        if done.returncode == 0 and (folder / "found.json").exists():
            return json.loads((folder / "found.json").read_text())
        why = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    return {"skipped": why}


def _clusters(count, pairs):
    root = list(range(count))

    def top(i):
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    for i, j in pairs:
        root[top(i)] = top(j)
    return [top(i) for i in range(count)]


def _vectors(texts, target):
    import numpy as np
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    start = time.perf_counter()
    table = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3), sublinear_tf=True).fit_transform(texts)
    np.save(target, TruncatedSVD(128, random_state=0).fit_transform(table).astype(np.float32))
    return time.perf_counter() - start


def score(found: dict, count: int, near: list, planted: list) -> dict:
    "Rows named and missed, edits joined with their text; each share with its 95 % Wilson interval."
    from ftnb.evaluate import wilson

    def share(k, n):
        low, high = wilson(k, n)
        return {
            "k": k,
            "n": n,
            "share": round(k / n, 4) if n else None,
            "low": round(low, 4),
            "high": round(high, 4),
        }

    named, wanted = {i for p in found["pairs"] for i in p}, {i for p in near for i in p}
    root = _clusters(count, found["pairs"])
    return {
        "recall": share(len(named & wanted), len(wanted)),
        "precision": share(len(named & wanted), len(named)),
        "pairs_joined": share(sum(root[i] == root[j] for i, j in near), len(near)),
        "planted_joined": share(sum(root[i] == root[j] for i, j in planted), len(planted)),
    }


def main(data: Path, out: Path | None = None, rounds: int = 3, python: str | None = None) -> dict:
    "Runs all tools in turns, prints a table, writes `out` if given."
    texts, planted = rows(Path(data))
    near = truth(texts)
    pythons = [sys.executable, *([python] if python else [])]
    found = {name: [] for name in TOOLS}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "texts.json").write_text(json.dumps(texts))
        encoder = _vectors(texts, folder / "vectors.npy")
        for _ in range(rounds):
            for name, tool in TOOLS.items():
                if not (found[name] and "skipped" in found[name][-1]):
                    found[name].append(_run(tool, folder, pythons))
    result = {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
        "rows": len(texts),
        "near_pairs": len(near),
        "planted": len(planted),
        "rounds": rounds,
        "note": "recall and precision count rows that are 0.85 or more like another row (rapidfuzz, all pairs); "
        "semhash's own encoder needs a download, so its seconds and hits are those of TF-IDF/SVD vectors, "
        "cosine of 0.85; datasketch joins at a Jaccard similarity of 0.6, or 0.5 where candidates are checked",
        "tools": {},
    }
    ours = statistics.median(f["seconds"] for f in found["ftnb near_pairs_lsh"])
    print(f"{len(texts):,} rows, {len(near):,} near-identical pairs, {len(planted):,} planted edits")
    print(f"{'tool':<52} {'seconds':>8} {'x lsh':>7} {'recall':>7} {'prec.':>6} {'planted':>8}")
    for name, runs in found.items():
        if "skipped" in runs[-1]:
            result["tools"][name] = {"skipped": runs[-1]["skipped"]}
            print(f"{name:<52} skipped: {runs[-1]['skipped']}")
            continue
        seconds = statistics.median(r["seconds"] for r in runs) + (encoder if "TF-IDF" in name else 0)
        said = {"seconds": round(seconds, 2), "times_near_pairs_lsh": round(seconds / ours, 2)}
        said |= {"encoder_seconds": round(encoder, 2)} if "TF-IDF" in name else {}
        result["tools"][name] = said | score(runs[-1], len(texts), near, planted)
        shares = [result["tools"][name][k]["share"] or 0 for k in ("recall", "precision", "planted_joined")]
        print(f"{name:<52} {seconds:8.2f} {seconds / ours:7.1f}", "{:7.3f} {:6.3f} {:8.3f}".format(*shares))
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with banking77/")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each tool")
    parser.add_argument("--python", help="interpreter that has the other tools")
    parser.add_argument("--tool", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tool:
        work(options.tool, options.folder)
    elif not (options.data / "banking77" / "train.jsonl").is_file():
        sys.exit(f"no banking77/train.jsonl in {options.data}")
    else:
        main(options.data, options.out, options.rounds, options.python)
