"""A running server against the prompts of training: ours over a thousand odd rows, and stand-ins with the routes of
llama.cpp's server and of Ollama around a real tokenizer. Toy model."""

import json
import os
import random
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ftnb.data import Record, Splits
from ftnb.deploy import export
from ftnb.endpoint import ODD, OTHERS, Endpoint, check_endpoint, golden_prompts, other_server
from ftnb.engine import TorchEngine
from ftnb.format import first_difference, stop_ids
from ftnb.model import load_model, load_tokenizer
from ftnb.plan import InputError, Recipe
from ftnb.server import serving
from ftnb.train import train
from toys import FAST, Forked, ftnb, rows, toy_model, write_format

SYSTEM = "Name the class."
LETTERS = (
    "abc XYZ 0123 ,.!?'\"\\/{}[]<>|_ \n\t äöüßéñ ЖшΩ 日本語 👩‍👧 \u200b\u00a0 <|im_end|> <|im_start|> <think>"
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = toy_model(tmp_path_factory.mktemp("endpoint"))
    tokenizer = load_tokenizer(folder)
    return TorchEngine(load_model(folder, "float32"), tokenizer, frozenset(stop_ids(tokenizer)), SYSTEM)


def record(i, text, more=()):
    return Record(f"row-{i}", (*more, {"role": "user", "content": text}), "")


def drawn(n):
    draw, pieces = random.Random(0), [*LETTERS, *LETTERS.split(" ")]
    return [record(i, "".join(draw.choices(pieces, k=draw.randint(1, 40))).strip() or "x") for i in range(n)]


def test_a_thousand_odd_rows_are_the_same_tokens_in_training_and_in_the_server(engine):
    golden = golden_prompts(engine.tokenizer, drawn(1000), SYSTEM, n=1000)
    with serving(engine) as url:
        found = check_endpoint(url, engine.tokenizer, golden)
    assert found.ok and found.n == 1000 + len(ODD) + 2 and found.kind == "vLLM form", found.drifts[:3]


def test_a_server_with_several_models_is_asked_for_the_first_and_says_so(engine):
    golden = golden_prompts(engine.tokenizer, drawn(2), SYSTEM, n=2)
    with serving({"base": engine, "tuned": engine}) as url:
        unnamed = check_endpoint(url, engine.tokenizer, golden)
        named = check_endpoint(url, engine.tokenizer, golden, model="tuned")
    assert unnamed.listed == ("base", "tuned") and named.listed == ()
    assert "asked for base, the first of 2 models" in str(unnamed) and "asked for" not in str(named)


@contextmanager
def stand_in(**routes):
    "A server with just these routes: a path's last part and what answers the body."

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            route = routes.get(self.path.rsplit("/", 1)[1].replace("-", "_"))
            told = json.dumps(route(body) if route else {}).encode()
            self.send_response(200 if route else 404)
            self.end_headers()
            self.wfile.write(told)

        def do_GET(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def text_of(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_the_routes_of_llama_cpp_show_that_control_text_becomes_a_token(engine):
    def ids(body):
        assert body["parse_special"] and body["add_special"]
        return {"tokens": engine.tokenizer(body["content"], add_special_tokens=False)["input_ids"]}

    golden = golden_prompts(engine.tokenizer, drawn(0), SYSTEM)
    template = lambda body: {"prompt": text_of(engine.tokenizer, body["messages"])}  # noqa: E731
    with stand_in(apply_template=template, tokenize=ids) as url:
        found = check_endpoint(url, engine.tokenizer, golden)
    assert found.kind == "llama.cpp" and [d.id for d in found.drifts] == ["odd-6", "odd-7"]
    assert all("forge" in d.cause for d in found.drifts)


def test_the_route_of_ollama_tells_single_questions_only(engine):
    def generate(body):
        turns = [{"role": "system", "content": body["system"]}] if "system" in body else []
        text = text_of(engine.tokenizer, [*turns, {"role": "user", "content": body["prompt"]}])
        ids = engine.tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]
        return {"context": [*ids, 5], "prompt_eval_count": len(ids)}

    more = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    golden = golden_prompts(engine.tokenizer, [record(0, "first"), record(1, "second", more)], SYSTEM)
    with stand_in(generate=generate) as url:
        found = check_endpoint(url, engine.tokenizer, golden[:2])
    assert (found.kind, found.n, found.skipped) == ("Ollama", 1, 1)
    assert found.drifts[0].wanted == "\n" and "generation prompt" in found.drifts[0].cause


def test_an_endpoint_is_refused_by_name(engine):
    golden = golden_prompts(engine.tokenizer, drawn(2), SYSTEM)
    with pytest.raises(InputError, match="no golden prompts"):
        check_endpoint("http://127.0.0.1:1", engine.tokenizer, [])
    for url, why in (("ftp://x", "no address"), ("http://127.0.0.1:1", "cannot be reached")):
        with pytest.raises(InputError, match=why):
            Endpoint(url)
    with serving(engine, api_key="sesame") as url:
        with pytest.raises(InputError, match="wants a key"):
            Endpoint(url)
        assert check_endpoint(url, engine.tokenizer, golden, api_key="sesame").ok
        with pytest.raises(InputError, match="no model 'other'"):
            check_endpoint(url, engine.tokenizer, golden, {golden[0]["id"]: "x"}, "other", "sesame")


def test_first_difference_by_hand():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert [first_difference([1, 2, 3], x) for x in ([0, 1, 2, 3], [1, 2], [1, 2, 4], [1, 2, 3, 4])] == [
        0,
        2,
        2,
        3,
    ]


def test_the_command_checks_a_run_against_its_server(tmp_path):
    from ftnb.train import Run, load_run

    model, data = toy_model(tmp_path / "model"), write_format("csv", tmp_path)
    sets = [word for pair in FAST for word in ("--set", pair)]
    words = ["--data", data, "--task", "classification", "--model", model, *sets]
    assert ftnb("train", *words, "--out", "run", cwd=tmp_path).returncode == 0
    run = Run.load(tmp_path / "run")
    tuned, tokenizer = load_run(run)
    stops = frozenset(stop_ids(tokenizer))
    n = len(run.splits.test) + len(ODD) + 2
    with serving(TorchEngine(tuned, tokenizer, stops, run.recipe.system)) as url:
        done = ftnb("check-endpoint", url, "run", cwd=tmp_path)
    assert done.returncode == 0 and f"{n} of {n} prompts equal" in done.stdout, done.stderr
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n'", "assistant'")
    with serving(TorchEngine(tuned, tokenizer, stops, run.recipe.system)) as url:
        done = ftnb("check-endpoint", url, "run", cwd=tmp_path)
    assert done.returncode == 2 and "generation prompt" in done.stdout, done.stdout


SHORT = {
    "dtype": "float32",
    "epochs": 1,
    "batch_size": 8,
    "evals_per_epoch": 1,
    "max_new_tokens": 4,
    "r": 4,
    "alpha": 8,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A run of the toy and what other servers read of it."
    folder = tmp_path_factory.mktemp("others")
    records = [record(i, text) for i, (text, _) in enumerate(rows(24))]
    records = [Record(r.id, r.messages, label) for r, (_, label) in zip(records, rows(24))]
    recipe = Recipe(
        name="toy", task="classification", model=str(toy_model(folder / "base")), system=SYSTEM, **SHORT
    )
    run = train(recipe, Splits(records[:16], records[16:20], records[20:]), folder / "run")
    return run, {a.kind: a for a in export(run, kinds=("adapter", "merged", "gguf-f16", "gguf-lora"))}


@pytest.mark.parametrize("kind", ["gguf-f16", "gguf-lora"])
def test_llama_cpp_own_server_builds_the_prompts_of_training_but_takes_control_text_for_tokens(
    exported, kind
):
    pytest.importorskip("xllamacpp", reason="llama.cpp's own server is not installed")
    run, exports = exported
    tokenizer = load_tokenizer(run.adapter_dir)
    golden = golden_prompts(tokenizer, drawn(40), SYSTEM)
    with other_server(exports[kind].dir, "llama-server") as url:
        found = check_endpoint(url, tokenizer, golden)
        served = Endpoint(url)
        counts = {g["id"]: served.answer(g, 1)[2] for g in golden[-2:]}
    spelled = {
        g["id"]
        for g in golden
        if any(s in g["messages"][-1]["content"] for s in tokenizer.all_special_tokens)
    }
    assert found.kind == "llama.cpp" and found.n == len(golden)
    assert {d.id for d in found.drifts} == spelled >= {"odd-6", "odd-7"}
    assert {d.cause for d in found.drifts} == {
        "text of a control token becomes the token: a user can forge turns"
    }
    assert counts == {d.id: d.count for d in found.drifts if d.id in counts}, (
        "what is asked is what is answered"
    )
    with pytest.raises(InputError, match="cannot be reached"):
        Endpoint(url)  # it was stopped


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_vllm_builds_the_prompts_of_training(exported, kind):
    program = os.environ.get("FTNB_VLLM", "vllm")
    if not shutil.which(program):
        pytest.skip("vllm is not installed; FTNB_VLLM=PATH names one of another environment")
    run, exports = exported
    tokenizer = load_tokenizer(run.adapter_dir)
    golden = golden_prompts(tokenizer, drawn(40), SYSTEM)
    small = ("--dtype", "float32", "--gpu-memory-utilization", "0.3", "--enforce-eager")
    with other_server(exports[kind].dir, program, small, 600) as url:
        found = check_endpoint(url, tokenizer, golden)
    assert found.kind == "vLLM form" and found.n == len(golden)
    assert {d.cause for d in found.drifts} <= {
        "text of a control token becomes the token: a user can forge turns"
    }


def test_a_program_that_does_not_start_is_named_with_its_last_words(exported, tmp_path):
    _, exports = exported
    for name, text, words in (
        (
            "llama-server",
            "echo loading; echo error: no such tensor >&2; exit 3",
            "ended with status 3: error: no such",
        ),
        ("vllm", "sleep 60", "did not answer within 1 s: no word"),
    ):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        kind = "gguf-f16" if name == "llama-server" else "merged"
        with pytest.raises(InputError, match=words), other_server(exports[kind].dir, program, seconds=1):
            pass
    with pytest.raises(
        InputError, match="merged is no export for llama-server; SERVE.md has commands for text-gen"
    ):
        with other_server(exports["merged"].dir, "llama-server"):
            pass
    with pytest.raises(InputError, match="/no/vllm is no program on this machine"):
        with other_server(exports["merged"].dir, "/no/vllm"):
            pass


def test_a_command_that_somebody_wrote_into_an_export_is_not_run(exported, tmp_path):
    run, exports = exported
    own = Path(shutil.copytree(exports["gguf-f16"].dir, tmp_path / "own"))
    (own / "SERVE.md").write_text("    llama-server -m model.gguf --api-key-file /etc/passwd\n")
    seen = tmp_path / "llama-server"
    seen.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told; exit 1\n')
    seen.chmod(0o755)
    with pytest.raises(InputError, match="SERVE.md"), other_server(own, seen):
        pass  # it is not as its manifest says
    with pytest.raises(InputError, match="ended with status 1"), other_server(exports["gguf-f16"].dir, seen):
        pass
    told = (tmp_path / "told").read_text().split()
    assert (
        told[:2] == ["-m", "model.gguf"]
        and "--api-key-file" not in told
        and set(OTHERS) == {"llama-server", "vllm"}
    )


def test_the_verb_starts_the_program_on_the_export_and_stops_it(exported, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp's own server is not installed")
    run, _ = exported
    done = ftnb(
        "check-endpoint", "llama-server", str(run.dir), "--kind", "gguf-f16", "--rows", "3", cwd=tmp_path
    )
    assert done.returncode == 2 and "(llama.cpp): token ids of 9 of 11 prompts equal" in done.stdout, (
        done.stderr
    )
    assert "odd-7, token" in done.stdout and "starting     llama-server on" in done.stdout
    done = ftnb("check-endpoint", "http://127.0.0.1:9", str(run.dir), "--kind", "merged", cwd=tmp_path)
    assert done.returncode == 2 and "--kind is of the export that a program is started on" in done.stderr


def test_a_server_goes_with_the_process_that_started_it(exported, tmp_path):
    _, exports = exported
    program = tmp_path / "llama-server"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid; exec sleep 300\n")
    program.chmod(0o755)
    code = "import sys; from ftnb.endpoint import other_server as s; s(*sys.argv[1:]).__enter__()"
    one = Forked(str(exports["gguf-f16"].dir), str(program), cwd=tmp_path, code=code)
    end = time.monotonic() + 120
    while not (tmp_path / "pid").is_file() and one.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    pid = int((tmp_path / "pid").read_text())
    one.send_signal(signal.SIGTERM)
    assert one.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
