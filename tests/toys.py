"""Small things the tests share: a toy model with the real tokenizer, toy data in every format, and the command line."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, settings

from conftest import ROOT

FAST = (
    "epochs=1 batch_size=8 accumulation=1 evals_per_epoch=1 max_new_tokens=4 max_length=256 shots=1 r=4 alpha=8"
).split()

quick = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def toy_model(folder: Path, spread: float = 0.02) -> Path:
    "Save a random two-layer Llama with the default model's own tokenizer; weights of a larger `spread` say more kinds of thing."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ftnb.model import DEFAULT_MODEL, load_tokenizer

    tokenizer = load_tokenizer(DEFAULT_MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=spread,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stand_in(folder: Path) -> None:
    "In this process the model in `folder` is the default one: every cell runs, in seconds."
    import ftnb.model
    import ftnb.train  # noqa: F401

    real = ftnb.model.resolve

    def resolve(name, *more):
        return Path(folder) if name == ftnb.model.DEFAULT_MODEL else real(name, *more)

    for name, module in [*sys.modules.items()]:
        if name.startswith("ftnb.") and hasattr(module, "resolve"):
            module.resolve = resolve


def rows(n: int = 72) -> list[tuple[str, str]]:
    "Messages of three kinds in invented words, so that no two are near-identical; a cue word tells the kind."
    draw = random.Random(0)

    def word():
        return "".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(draw.randint(2, 4)))

    cues = ("hours", "return", "price")
    return [
        (" ".join([word(), word(), cues[i % 3], *(word() for _ in range(draw.randint(3, 7)))]), cues[i % 3])
        for i in range(n)
    ]


def lines(items) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def write_format(kind: str, folder: Path) -> Path:
    "The toy rows in one of the formats that `ftnb run --data` takes."
    pairs = rows()
    path = folder / {"csv": "toy.csv", "tsv": "toy.tsv", "json": "toy.json", "parquet": "toy.parquet"}.get(
        kind, f"{kind}.jsonl"
    )
    records = [{"text": t, "label": a} for t, a in pairs]
    if kind in ("csv", "tsv"):
        import csv

        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    elif kind == "json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif kind == "parquet":
        import pandas

        pandas.DataFrame(records).to_parquet(path)
    else:
        ask = "Name the kind of message."
        shapes = {
            "text-label": lambda t, a: {"text": t, "label": a},
            "prompt-completion": lambda t, a: {"prompt": t, "completion": a},
            "alpaca": lambda t, a: {"instruction": ask, "input": t, "output": a},
            "messages": lambda t, a: {
                "messages": [{"role": "user", "content": t}, {"role": "assistant", "content": a}]
            },
            "sharegpt": lambda t, a: {
                "conversations": [{"from": "human", "value": t}, {"from": "gpt", "value": a}]
            },
        }
        path.write_text(lines(shapes[kind](t, a) for t, a in pairs), encoding="utf-8")
    return path


COMMAND = "import sys; from ftnb.cli import main; sys.exit(main())"


def surroundings(**env) -> dict:
    "The variables of a process of its own, which finds this ftnb."
    return {**os.environ, "PYTHONPATH": str(ROOT), **env}


class Forked:
    "A command, ftnb's own or other code, forked from `forks.py`, with what a `Popen` has; it writes to files."

    server = None  # of this test process

    def __init__(self, *args, cwd, code=COMMAND, **env):
        if Forked.server is None or Forked.server.poll() is not None:
            Forked.server = subprocess.Popen(
                [sys.executable, ROOT / "tests/forks.py"],
                env=surroundings(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
        self.args, self.returncode = [*map(str, args)], None
        self.files = [tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") for _ in "oe"]
        out, err = (file.name for file in self.files)
        asked = {"code": code, "arguments": self.args, "folder": str(cwd), "env": surroundings(**env)}
        self.pid = self._ask(**asked, out=out, err=err)["pid"]
        self.stderr = self.files[1]

    @staticmethod
    def _ask(**asked):
        Forked.server.stdin.write(json.dumps(asked) + "\n")
        Forked.server.stdin.flush()
        answer = Forked.server.stdout.readline()
        assert answer, "the process that forks the command line has ended"
        return json.loads(answer)

    def poll(self):
        if self.returncode is None:
            self.returncode = self._ask(poll=self.pid)["code"]
        return self.returncode

    def wait(self, timeout=None):
        end = time.monotonic() + (timeout or 3600)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return tuple(file.read() for file in self.files)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


def begin(*args, cwd: Path, **env):
    "Start the command line in a process of its own, to be stopped on the way; its stderr can be read."
    if not env and hasattr(os, "fork"):
        return Forked(*args, cwd=cwd)
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, args)],
        cwd=cwd,
        env=surroundings(**env),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen, seconds: float = 120) -> None:
    "Until the run in `folder` has logged the step; fails where the process ends or the time is over before."
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        history = folder / "history.jsonl"
        if history.exists() and f'"step": {step},' in history.read_text("utf-8"):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.stderr.read()[-800:]}")


def ftnb(*args, cwd: Path, timeout: float = 600, **env) -> subprocess.CompletedProcess:
    "Run the command line in a process of its own; with other `env`, one that imports everything itself."
    wide = {"COLUMNS": "120"}
    if env or not hasattr(os, "fork"):
        command = [sys.executable, "-c", COMMAND, *map(str, args)]
        every = surroundings(**wide | env)
        return subprocess.run(command, cwd=cwd, env=every, capture_output=True, text=True, timeout=timeout)
    process = Forked(*args, cwd=cwd, **wide)
    try:
        said = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def least_contrast(nodes: str) -> str:
    "JavaScript for the least contrast (WCAG 2, 1 to 21) of text and ground among the nodes that a selector names."
    return _CONTRAST.replace("NODES", nodes)


_CONTRAST = """() => {
  const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map((v) => v / 255)
      .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (n) => { for (; n; n = n.parentElement) { const c = getComputedStyle(n).backgroundColor;
      if (!/, 0\\)|transparent/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
  const nodes = document.querySelectorAll('NODES');
  return Math.min(...[...nodes].filter((n) => n.offsetParent && !n.disabled).map((n) => {
    const [a, b] = [light(getComputedStyle(n).color), light(behind(n))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05); })); }"""


TINY = {  # the shape of a two-layer model with words of its own
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
