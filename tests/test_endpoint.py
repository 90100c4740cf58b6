"""A running server against the prompts of training: ours over a thousand odd rows, and stand-ins with the routes of
llama.cpp's server and of Ollama around a real tokenizer. Toy model."""

import json
import random
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ftnb.data import Record
from ftnb.endpoint import ODD, Endpoint, check_endpoint, golden_prompts
from ftnb.engine import TorchEngine
from ftnb.format import first_difference, stop_ids
from ftnb.model import load_model, load_tokenizer
from ftnb.plan import InputError
from ftnb.server import serving
from toys import FAST, ftnb, toy_model, write_format

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
