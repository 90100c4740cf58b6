"""The server: who may come in, what is refused, what a crowd gets, and how it ends. Toy model; the counted rows of
`benchmarks/server.py`, small here and whole in the slow test."""

import asyncio
import importlib.util
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from ftnb.engine import Answer, Ask, Worker
from ftnb.plan import InputError
from ftnb.server import (
    ChatRequest,
    Limits,
    Metrics,
    Spelling,
    chat_request,
    listen,
    make_app,
    page_policy,
    serve,
    serving,
)
from ftnb.server import _Server as Server
from toys import quick

spec = importlib.util.spec_from_file_location("bench_server", ROOT / "benchmarks/server.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
HI = [{"role": "user", "content": "hi"}]
FORM = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server") / "toy"


@pytest.fixture(scope="module")
def engine(folder):
    return bench.toy_engine(folder)


@pytest.fixture(scope="module")
def hooked(folder):
    "The same toy in transformers, where a hook can slow it down or break it."
    return bench.toy_engine(folder, "torch")


@pytest.fixture(scope="module")
def url(engine):
    page = "<title>x</title><style>p {}</style><script>1</script>"
    with serving({"first": engine, "second": engine}, bench.KEY, waiting=256, pages={"/chat": page}) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url + "/v1", api_key=bench.KEY, max_retries=0)


def test_the_official_client_gets_answers_whole_and_streamed(client, engine):
    for name in ("first", "second"):
        told = {"model": name, "messages": HI, "max_tokens": 12}
        whole = client.chat.completions.create(**told)
        alone = engine.answer(engine.prompt(HI), 12)
        assert whole.choices[0].message.content == alone.text and whole.model == name
        assert whole.usage.completion_tokens == len(alone.ids) and whole.choices[0].finish_reason == "length"
        events = list(
            client.chat.completions.create(**told, stream=True, stream_options={"include_usage": True})
        )
        assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == alone.text
        assert events[-1].choices == [] and events[-1].usage == whole.usage
        assert [e.choices[0].finish_reason for e in events if e.choices and e.choices[0].finish_reason] == [
            "length"
        ]
    assert [m.id for m in client.models.list()] == ["first", "second"]
    assert client.models.retrieve("second").id == "second"


def test_a_stop_text_ends_the_answer_before_it(client, engine):
    text = engine.answer(engine.prompt(HI), 40).text
    stop = text[len(text) // 2 :][:3]
    choice = client.chat.completions.create(model="first", messages=HI, max_tokens=40, stop=stop).choices[0]
    assert (choice.message.content, choice.finish_reason) == (text[: text.find(stop)], "stop")


def test_answers_held_to_a_schema_fit_it(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": FORM, "strict": True}}
    for n, temperature in ((1, 0), (3, 0), (12, 0), (40, 1)):
        told = {"model": "first", "messages": HI, "max_tokens": n, "temperature": temperature}
        said = client.chat.completions.create(**told, response_format=form).choices[0].message.content
        assert isinstance(json.loads(said)["n"], int) and len(json.loads(said)) == 1
        events = client.chat.completions.create(**told, response_format=form, stream=True)
        assert "".join(e.choices[0].delta.content or "" for e in events) == said
    free = client.chat.completions.create(
        model="first", messages=HI, max_tokens=9, response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(free.choices[0].message.content), dict)


def test_errors_are_those_that_the_official_client_knows(client, url):
    def asked(**more):
        return client.chat.completions.create(**{"model": "first", "messages": HI, "max_tokens": 2} | more)

    with pytest.raises(openai.BadRequestError, match="temperature must be a number from 0 to 2"):
        asked(temperature=3)
    with pytest.raises(openai.BadRequestError, match="at most 2,047 fit") as error:
        asked(messages=[{"role": "user", "content": "word " * 3000}])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="llguidance cannot follow"):
        asked(
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}
        )
    with pytest.raises(openai.BadRequestError, match="max_tokens must be a whole number from 1 to 4,096"):
        asked(max_tokens=5000)
    with pytest.raises(openai.NotFoundError, match="no model 'third' here; served: first, second"):
        asked(model="third")
    for key in ("x", bench.KEY[:-1], bench.KEY + "x"):
        with pytest.raises(openai.AuthenticationError, match="valid key"):
            openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0).models.list()


def test_a_full_line_says_when_to_come_back(hooked):
    hook = hooked.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    try:
        with serving(hooked, waiting=1, slots=1) as url, ThreadPoolExecutor(6) as crowd:
            client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)

            def asked(n):
                try:
                    return (
                        client.chat.completions.create(model="ftnb", messages=HI, max_tokens=20)
                        .choices[0]
                        .message.content
                    )
                except openai.RateLimitError as error:
                    return int(error.response.headers["Retry-After"])

            got = list(crowd.map(asked, range(6)))
    finally:
        hook.remove()
    told = [g for g in got if isinstance(g, int)]
    assert told and all(1 <= g <= 60 for g in told)
    assert {g for g in got if isinstance(g, str)} == {hooked.answer(hooked.prompt(HI), 20).text}


def test_a_small_crowd_gets_right_answers_and_reasons(url):
    found = bench.crowd(url, bench.KEY, clients=8, each=20)
    assert found["requests"] == 160 == found["answered"] + found["refused"] + found["left"], found
    assert found["wrong"] == found["unanswered"] == found["not refused"] == found["traceback"] == 0, found
    assert found["answered"] >= 80 and found["refused"] >= 30 and found["different answers"] >= 40


def test_what_is_no_request_is_refused(url):
    found = bench.malformed(url, bench.KEY)
    assert found["n"] >= 45 and not found["not refused"]


def test_control_tokens_as_text_stay_text(url, engine):
    assert bench.forged(url, engine.tokenizer, bench.KEY, n=200) == {"n": 200, "control ids from content": 0}


@given(st.binary(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["messages", "role", "content", "tools", "stop", "stream", "function", "type", "user"]), inner, max_size=4
    ), max_leaves=12).map(lambda x: json.dumps(x).encode()))  # fmt: skip
@quick
def test_any_bytes_are_a_request_or_a_reason(body):
    try:
        assert isinstance(chat_request(body), ChatRequest)
    except InputError as error:
        assert "\n" not in str(error)


def test_the_door(url):
    client = bench.Client(url)
    host, port = client.place

    def status(path, **head):
        client.close()
        client.head = {name.replace("_", "-"): value for name, value in head.items()}
        return client(path)[0]

    right = {"Authorization": f"Bearer {bench.KEY}"}
    assert [status("/health"), status("/chat")] == [200, 200]
    assert [status(path) for path in ("/v1/models", "/metrics", "/nothing")] == [401] * 3
    assert [status(path, **right) for path in ("/v1/models", "/metrics", "/nothing", "/tokenize")] == [
        200,
        200,
        404,
        405,
    ]
    assert status(f"/v1/models?key={bench.KEY}", **right) == 400
    assert status("/health", Origin="https://example.org") == 403
    assert status("/health", Origin=f"http://{host}:{port}") == 200


def test_without_a_key_only_this_machine_is_answered(engine):
    with serving(engine) as url:
        client = bench.Client(url)
        assert client("/health")[0] == 200
        for host, status in (
            ("example.org", 403),
            ("127.0.0.1.example.org", 403),
            ("localhost:1", 200),
            ("[::1]", 200),
        ):
            client.head = {"Host": host}
            client.close()
            assert client("/health")[0] == status, host
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(InputError, match="can be reached by others"):
            listen(host, 0)
    with listen("127.0.0.1", 0) as taken, pytest.raises(InputError, match="is in use"):
        serve(engine, port=taken.getsockname()[1])
    for more in ({"slots": 0}, {"slots": 129}, {"waiting": 0}, {"limits": Limits(max_tokens=0)}):
        with pytest.raises(InputError, match="must be from 1 to"):
            serve(engine, port=0, **more)
    with pytest.raises(InputError, match="nothing to serve"):
        serve([], port=0)
    with pytest.raises(InputError, match="2 models are called"):
        serve([type("A", (), {"name": "a"}), type("A", (), {"name": "a"})], port=0)


def test_a_page_runs_no_script_but_its_own(url):
    client = bench.Client(url)
    client("/chat")
    client.close()
    with socket.create_connection(tuple(client.place)) as raw:
        raw.sendall(b"GET /chat HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        head = b"".join(iter(lambda: raw.recv(4096), b"")).decode()
    policy = page_policy("<title>x</title><style>p {}</style><script>1</script>")
    assert policy in head and "default-src 'none'" in policy and policy.count("sha256-") == 2
    assert (
        "unsafe" not in policy
        and page_policy("<p>") == page_policy("")
        and "script-src 'none'" in page_policy("")
    )


def test_the_metrics_are_those_that_prometheus_reads(url, client):
    parser = pytest.importorskip("prometheus_client.parser")
    client.chat.completions.create(model="first", messages=HI, max_tokens=3)
    ask = bench.Client(url, bench.KEY)
    families = {f.name: f for f in parser.text_string_to_metric_families(ask("/metrics")[1].decode())}
    now = {s.name + str(sorted(s.labels.items())): s.value for f in families.values() for s in f.samples}
    assert {f.type for f in families.values()} == {"counter", "gauge", "histogram"} and len(families) == 10
    for name in ("first_token_seconds", "request_seconds", "prompt_tokens", "answer_tokens"):
        samples = [s for s in families[f"ftnb_{name}"].samples if s.name.endswith("_bucket")]
        assert samples[-1].labels == {"le": "+Inf"} and samples[-1].value == now[f"ftnb_{name}_count[]"] >= 1
        assert [s.value for s in samples] == sorted(s.value for s in samples)
    assert now["ftnb_slots[]"] == 16 and now["ftnb_running[]"] == 0
    odd = Metrics()
    odd.add("requests_total", route='a"b\\c\nd', status=200)
    (family,) = [f for f in parser.text_string_to_metric_families(odd.text()) if f.name == "ftnb_requests"]
    assert family.samples[0].labels == {"route": 'a"b\\c\nd', "status": "200"}


def test_a_slow_client_is_let_go(engine):
    limits = Limits(header_seconds=0.4, body_seconds=0.6)
    with serving(engine, limits=limits) as url:
        place = tuple(url.removeprefix("http://").split(":"))
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 500\r\n\r\n"

        def ended(first, drip):
            with socket.create_connection(place) as raw:
                raw.sendall(first)
                raw.settimeout(0.1)
                begun, got = time.monotonic(), b""
                while time.monotonic() < begun + 5:
                    try:
                        raw.sendall(drip)
                        part = raw.recv(1000)
                        got += part
                        if not part:
                            break
                    except TimeoutError:
                        pass
                    except OSError:
                        break
                return time.monotonic() - begun, got

        for first, drip in ((b"", b""), (b"", b"G"), (head[:20], b"x"), (head, b" "), (head, b"")):
            seconds, got = ended(first, drip)
            assert seconds < 3 and (first != head or b" 408 " in got), (first, seconds, got)
        large = head.replace(b"500", b"50000000")
        seconds, got = ended(large, b"x" * 100)  # refused at once, and not listened to for ever
        assert b" 413 " in got and seconds < 3
        assert bench.Client(url)("/health")[0] == 200


def test_what_is_too_large_is_refused(url):
    found = bench.too_large(url, bench.KEY, each=2)
    assert found["n"] == 12 and found["p50"] < 0.5


def test_a_client_that_leaves_stops_the_writing(folder):
    found = bench.leaving(folder, n=4)
    assert found["readings after"] <= 2 and found["slot free within seconds"] < 5, found


@pytest.mark.parametrize("enough", [True, False])
def test_a_stop_lets_what_was_begun_come_to_its_end(hooked, enough):
    hook = hooked.model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    held, worker = listen("127.0.0.1", 0), Worker({"ftnb": hooked}, slots=4, waiting=8)
    server = Server(make_app(worker), Limits(), drain=30 if enough else 0.5)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [held]}, daemon=True)
    url = f"http://127.0.0.1:{held.getsockname()[1]}"
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        answers, late, health = [], bench.Client(url), bench.Client(url)
        assert late("/v1/models")[0] == health("/health")[0] == 200
        streams = bench._streams(url, 3, 40 if enough else 1500, answers)
        bench._running(url, 3)
        server.handle_exit(signal.SIGTERM, None)
        assert (health("/health")[0], late(bench.CHAT, bench.chat("new"))[0]) == (503, 503)
        for stream in streams:
            stream.join(20)
        thread.join(10)
    finally:
        hook.remove()
        server.should_exit = True
        assert worker.close(5)
    assert not thread.is_alive() and server.cut == (0 if enough else 3)
    whole = [got.endswith(b"data: [DONE]\n\n") for _, got in answers]
    assert whole == [enough] * 3 and (enough or all(b"the server stopped" in got for _, got in answers))


def test_an_error_of_the_model_is_told_without_its_text(hooked):
    def fail(*_):
        raise RuntimeError("secret detail")

    with serving(hooked) as url:
        hook = hooked.model.register_forward_pre_hook(fail)
        try:
            got = [bench.Client(url)(bench.CHAT, bench.chat("hi", stream=s)) for s in (False, True)]
        finally:
            hook.remove()
        assert [status for status, *_ in got] == [500, 500] and not any(
            b"secret" in text for _, text, _ in got
        )
        assert bench.Client(url)(bench.CHAT, bench.chat("hi"))[0] == 200


@given(
    st.lists(st.integers(0, 49151), max_size=30),
    st.lists(st.sampled_from(["a", "\n", "th", "é", "the"]), max_size=2),
)
@quick
def test_pieces_are_the_whole_text(engine, ids, stop):
    spelling, said = Spelling(engine.tokenizer, tuple(stop)), ""
    for i in ids:
        said += spelling.add(i)
        if spelling.ended:
            break
    said += spelling.add(None)
    text = engine.tokenizer.decode(ids, skip_special_tokens=True)
    ends = [at for s in stop if (at := text.find(s)) >= 0]
    assert said == (text[: min(ends)] if ends else text)


def test_an_answer_that_nobody_waits_for_is_cancelled():
    answer = Answer(Ask((1, 2)), 5)

    async def leave():
        reading = asyncio.create_task(anext(aiter(answer)))
        await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    asyncio.run(leave())
    assert answer.reason == "cancelled"


@pytest.mark.slow
def test_the_rows_of_the_reliability_table(tmp_path):
    import subprocess
    import sys

    out = tmp_path / "server.json"
    subprocess.run([sys.executable, ROOT / "benchmarks/server.py", "--out", out], check=True, timeout=3000)
    found = json.loads(out.read_text("utf-8"))
    crowd = found["crowd"]
    assert crowd["requests"] == 12_800 == crowd["answered"] + crowd["refused"] + crowd["left"]
    assert crowd["wrong"] == crowd["unanswered"] == crowd["traceback"] == found["crashes"] == 0
    assert crowd["p99"] <= crowd["p99 bound"] and found["memory"]["growth"] <= 0.05
    assert found["too_large"]["n"] >= 50 and found["too_large"]["p99"] <= 0.05
    assert found["malformed"]["refused"] == found["malformed"]["n"] and not found["key in the log"]
    assert found["slow_clients"]["ended by the server"] == 200 and found["slow_clients"]["ratio"] <= 1.5
    assert found["keys"]["refused"] == found["keys"]["tries"] and found["keys"]["right key"] == 200
    assert found["leaving"]["readings after"] <= 1 and found["forged"]["control ids from content"] == 0
    ends = found["kill_and_stop"]
    assert ends["ended whole"] == ends["begun"] and ends["exit code"] == 0 and not ends["model files changed"]
    assert ends["again"] - ends["of it imports"] <= 5
