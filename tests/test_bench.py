"""The load generator against servers of a known pace, broken servers, and our own around a toy model; the benchmark's
bookkeeping on hand-written rows."""

import asyncio
import json
import math
import random
import socket
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from conftest import ROOT
from ftnb.bench import (
    Load,
    Loads,
    Reply,
    Target,
    _one,
    _until,
    arrivals,
    bench,
    bench_open,
    cost_line,
    load_table,
    metronome,
    plot_loads,
    pooled,
    speed_ratio,
    summary,
    wait_quantile,
)
from ftnb.engine import TorchEngine
from ftnb.format import stop_ids
from ftnb.model import DEFAULT_MODEL, load_model, load_tokenizer
from ftnb.plan import InputError
from ftnb.server import serving
from toys import toy_model

ASK = [{"role": "user", "content": "When do you open?"}]


def level(*waits, seconds=10.0, clients=1):
    "A level whose requests were due at 0 and ended after these waits; None = still running."
    rows = [Reply(i, 0.0, 0.0, w, w, 200, f"answer {i}", "stop", 3, 3) for i, w in enumerate(waits)]
    return Load(clients, 0.0, seconds, tuple(rows))


@contextmanager
def raw_server(answer):
    "A server that says these bytes to each chat request, whatever it is asked."

    async def talk(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        size = [int(h[15:]) for h in head.splitlines() if h.startswith(b"content-length:")]
        await reader.readexactly(size[0] if size else 0)
        names = b'HTTP/1.1 200 X\r\n\r\n{"data": [{"id": "raw"}]}'
        writer.write(
            answer
            if b"chat" in head.split()[1]
            else names
            if b"models" in head
            else b"HTTP/1.1 404 X\r\n\r\n"
        )
        await writer.drain()
        writer.close()

    loop, ready = asyncio.new_event_loop(), threading.Event()
    port = []

    async def main():
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        port.append(server.sockets[0].getsockname()[1])
        ready.set()
        async with server:
            await server.serve_forever()

    def run():
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass

    task = loop.create_task(main())
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(5)
    try:
        yield f"http://127.0.0.1:{port[0]}"
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(5)
        loop.close()


def stream(*events):
    return b"HTTP/1.1 200 X\r\n\r\n" + b"".join(b"data: " + e + b"\n\n" for e in events)


TEXT = json.dumps(
    {"choices": [{"delta": {"content": "hé"}, "finish_reason": None}]}, ensure_ascii=False
).encode()
END = b'{"choices": [{"delta": {}, "finish_reason": "stop"}]}'


@pytest.mark.alone
def test_the_clock_says_what_was_set():
    with metronome(first=0.1, each=0.02, pieces=10) as url:
        load = bench(url, [ASK], clients=(4,), requests=12)[0]
    assert (load.answered, load.errors, load.tokens) == (12, {}, 120)
    assert 0.1 <= load.waits("first", 0.5).value < 0.2 and 0.3 <= load.waits("ended", 0.5).value < 0.5
    assert 12 * 10 / load.seconds == pytest.approx(load.tokens_per_second)
    assert load.uncounted.value == 0


def test_what_is_cut_off_still_counts_as_waiting():
    async def four():
        kept, begun = [], time.perf_counter()

        def clock():
            return time.perf_counter() - begun

        tasks = [asyncio.create_task(_one(Target(url), ASK, n, clock, kept)) for n in range(4)]
        return await _until(kept, tasks, 0.5, clock, 4)

    with metronome(first=30) as url:  # a level without the warm-up, which would wait as well
        load = asyncio.run(four())
    assert len(load.replies) == 4 and load.answered == 0 and load.errors == {}
    row = summary(load)
    assert (row["unfinished"], row["first_p50"][0]) == (4, None) and 0.4 < row["longest"] < 2
    assert "over 0." in load_table({"slow": [row]})


@pytest.mark.parametrize(
    "said, key",
    [
        (stream(TEXT), "stream"),  # breaks off in the middle
        (stream(TEXT, b'{"error": {"message": "out of memory"}}'), "stream"),
        (stream(b"not json"), "connection"),
        (b"HTTP/1.1 500 X\r\nContent-Length: 2\r\n\r\nno", "500"),
        (b"garbage\r\n\r\n", "connection"),
        (b"", "connection"),
        (b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "connection"),
    ],
    ids=["broken off", "error event", "no JSON", "500", "no HTTP", "nothing", "bad chunk"],
)
def test_a_broken_answer_is_an_error_and_no_answer(said, key):
    with raw_server(said) as url:
        load = bench(url, [ASK], clients=(1,), requests=1)[0]
    assert (load.answered, load.errors) == (0, {key: 1}), load.replies
    assert load.waits("first", 0.5) is None and load.replies[0].error


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_chunks_that_split_lines_and_letters_are_put_together(size):
    whole = b"".join(b"data: " + e + b"\r\n\r\n" for e in (TEXT, TEXT, END, b"[DONE]"))
    cut = [whole[i : i + size] for i in range(0, len(whole), size)]
    body = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in cut) + b"0\r\n\r\n"
    with raw_server(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n" + body) as url:
        load = bench(url, [ASK], clients=(1,), requests=1)[0]
    reply = load.replies[0]
    assert (reply.text, reply.pieces, reply.reason, reply.tokens, load.tokens) == ("héhé", 2, "stop", None, 2)
    assert load.uncounted is None


@pytest.mark.alone
def test_refusals_have_their_status_and_a_stall_shows_in_the_open_loop_only():
    with metronome(status=429) as url:
        refused = bench(url, [ASK], clients=(8,), requests=8)
    assert refused[0].errors == {"429": 8} and refused[0].seconds < 5
    with metronome(pieces=2, stall_at=60, stall=0.6) as url:
        closed = bench(url, [ASK], clients=(1,), requests=120)[0]
    with metronome(pieces=2, stall_at=60, stall=0.6) as url:
        opened = bench_open(url, [ASK], (60.0,), requests=120, seed=1)[0]
    late = [sum(r.first - r.due > 0.3 for r in x.replies) for x in (closed, opened)]
    assert late[0] == 1 and late[1] > 6, late


def test_a_closed_loop_never_has_more_at_once_than_clients_and_an_open_one_keeps_its_times():
    with metronome(first=0.02, pieces=1) as url:
        load = bench(url, [ASK], clients=(5,), requests=40)[0]
        opened = bench_open(url, [ASK], (100.0,), requests=40, seed=3)[0]
    marks = sorted([(r.sent, 1) for r in load.replies] + [(r.ended, -1) for r in load.replies])
    at_once = [sum(d for _, d in marks[: i + 1]) for i in range(len(marks))]
    assert max(at_once) == 5 and len(load.replies) == 40
    assert [round(r.due, 9) for r in opened.replies] == [round(t, 9) for t in arrivals(100.0, 40, 3)]
    assert all(r.sent >= r.due for r in opened.replies) and opened.clients == 0


def test_a_quantile_without_cuts_is_the_order_statistic_and_cuts_only_raise_it():
    draw = random.Random(0)
    for _ in range(200):
        waits, q = [draw.random() for _ in range(draw.randint(1, 60))], draw.choice((0.5, 0.9, 0.99))
        found = wait_quantile(waits, [True] * len(waits), q)
        assert found.value == sorted(waits)[math.ceil(q * len(waits) - 1e-9) - 1]
        assert found.low <= found.value <= found.high
        over = [draw.random() < 0.7 for _ in waits]
        assert wait_quantile(waits, over, q).value >= found.value


def test_kaplan_and_meier_by_hand():
    # at 1: 1/4 gone; at 2 one is cut; at 3: 3/4 * 1/2 remain; at 4 all are gone
    waits, over = [1.0, 2.0, 3.0, 4.0], [True, False, True, True]
    assert [wait_quantile(waits, over, q).value for q in (0.25, 0.26, 0.625, 0.63)] == [1.0, 3.0, 3.0, 4.0]


def test_pooled_rounds_keep_every_wait():
    a, b = level(1.0, 2.0, None, seconds=5.0), level(3.0, None, seconds=9.0)
    both = pooled([a, b])
    assert (both.answered, both.seconds, len(both.replies)) == (3, 14.0, 5)
    waits = sorted((14.0 if r.ended is None else r.ended) - r.due for r in both.replies)
    assert waits == [1.0, 2.0, 3.0, 5.0, 9.0]
    with pytest.raises(InputError, match="same level"):
        pooled([a, level(1.0, clients=2)])


def test_ratios_of_speed_are_symmetric():
    a, b = [3.0, 4.0, 5.0], [1.0, 1.9, 2.1]
    one, other = speed_ratio(a, b), speed_ratio(b, a)
    assert one.value * other.value == pytest.approx(1) and one.low * other.high == pytest.approx(1)
    assert one.low < one.value < one.high and (one.n, one.unit) == (3, "rounds")
    for bad in (([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0])):
        with pytest.raises(InputError):
            speed_ratio(*bad)


def test_saved_loads_come_back_and_a_broken_file_is_named(tmp_path):
    loads = Loads([level(0.5, 0.75, None), level(1.0)], "mine")
    loads.save(tmp_path / "loads.json")
    back = Loads.load(tmp_path / "loads.json")
    assert back == loads and back.name == "mine" and back.answers() == {0: "answer 0", 1: "answer 1"}
    for text in ("", "[]", '{"loads": [{"clients": 1}], "name": "x"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match="no saved loads"):
            Loads.load(tmp_path / "bad.json")


def test_price_of_an_answer_is_the_hour_over_its_answers():
    load = level(*[0.1] * 36, seconds=36.0)  # one a second
    assert load.answers_per_hour == pytest.approx(3600)
    assert load.per_thousand(3.6) == pytest.approx(1.0)
    assert "1,000 answers cost 1 dollars" in cost_line(load, 3.6)
    assert level(None).per_thousand(1.0) == math.inf


@pytest.mark.parametrize(
    "more, said",
    [
        ({"clients": (0,), "requests": 1}, "clients must be whole numbers from 1 to 1,024, got 0"),
        ({"clients": (True,), "requests": 1}, "clients must be"),
        ({"requests": 0}, "requests must be"),
        ({"seconds": 0}, "seconds must be above 0"),
        ({}, "a level needs an end"),
        ({"requests": 1, "max_tokens": 0}, "max_tokens must be from 1"),
    ],
)
def test_numbers_out_of_range_are_named_before_anything_is_sent(more, said):
    with pytest.raises(InputError, match=said):
        bench("http://127.0.0.1:9", [ASK], **more)


def test_no_prompts_no_server_and_a_wrong_address_are_named():
    with pytest.raises(InputError, match="prompts must be"):
        bench("http://127.0.0.1:9", [], requests=1)
    with socket.socket() as held:  # bound, and nobody listens
        held.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="cannot be reached"):
            bench(f"http://127.0.0.1:{held.getsockname()[1]}", [ASK], requests=1)
    with pytest.raises(InputError, match="no address"):
        bench("127.0.0.1:8000", [ASK], requests=1)
    with pytest.raises(InputError, match="rates must be"):
        bench_open("http://127.0.0.1:9", [ASK], (0.0,))


def test_our_server_gives_every_client_the_engines_own_answer(tmp_path_factory):
    folder = toy_model(tmp_path_factory.mktemp("bench"))
    tokenizer = load_tokenizer(folder)
    engine = TorchEngine(load_model(folder, "float32"), tokenizer, frozenset(stop_ids(tokenizer)), "")
    prompts = [[{"role": "user", "content": f"question {n}"}] for n in range(6)]
    with serving(engine, api_key="secret") as url:
        loads = bench(url, prompts, clients=(1, 4), requests=12, max_tokens=5, api_key="secret")
        with pytest.raises(InputError, match="wants a key"):
            bench(url, prompts, clients=(1,), requests=1)
    own = [a.text.strip() for a in engine.generate([engine.prompt(p) for p in prompts], 5)]
    assert [(x.answered, x.errors) for x in loads] == [(12, {})] * 2
    assert all(r.text.strip() == own[r.prompt] for x in loads for r in x.replies)


def test_the_plot_shows_each_server_and_marks_waits_without_an_end():
    rows = {
        "a": [summary(level(0.1, 0.2)), summary(level(0.3, 0.3, clients=4))],
        "b": [summary(level(None, None))],
    }
    fig = plot_loads(rows)
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["a", "b"]
    assert len(fig.axes[1].texts) == 1 and [len(x.lines[0].get_xdata()) for x in fig.axes] == [2, 2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "serve", raising=False)
    import serve

    yield serve
    sys.modules.pop("serve", None)


def test_the_benchmark_counts_tokens_in_one_way_and_reports_its_goals(benchmark):
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    made, usage = benchmark.counted(
        {
            "load": {
                "clients": 1,
                "rate": 0.0,
                "seconds": 2.0,
                "replies": [dict(level(1.0).replies[0].__dict__)],
            }
        },
        tokenizer,
    )
    assert (made.tokens, usage) == (len(tokenizer("answer 0")["input_ids"]), [True])
    fast, slow = level(*[1.0] * 8, clients=16), level(*[1.0] * 2, clients=16)
    rounds = {benchmark.OURS: {16: {0: fast, 1: fast}}, benchmark.THEIRS: {16: {0: slow, 1: slow}}}
    goal = benchmark.goals(rounds)
    assert [(g["theirs"], g["clients"], round(g["ratio"]["value"], 6)) for g in goal] == [
        (benchmark.THEIRS, 16, 4.0)
    ]
    said = benchmark.answers_of([level(1.0, 2.0)])
    assert (
        benchmark.share(said, {0: "answer 0", 1: "other"})["value"] == 0.5
        and benchmark.share(said, {}) is None
    )
