"""A model tuned on tool calls, served: the prompt is that of training, and calls come back as calls. Toy model."""

import json
from dataclasses import replace

import pytest
from openai import OpenAI

from ftnb.certify import golden_answers
from ftnb.data import Record, split, tool_call_text
from ftnb.deploy import export
from ftnb.engine import load_for_generation
from ftnb.format import parse_calls, prompt_for
from ftnb.plan import Recipe
from ftnb.server import serving
from ftnb.train import train
from toys import rows, toy_model

TOOL = {
    "type": "function",
    "function": {
        "name": "open_door",
        "description": "Opens a door",
        "parameters": {"type": "object", "properties": {"door": {"type": "string"}}},
    },
}


def asked(n, said, door):
    text = tool_call_text([{"function": {"name": "open_door", "arguments": {"door": door}}}])
    return Record(f"r{n}", ({"role": "user", "content": said},), text, tools=(TOOL,))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    records = [asked(n, *pair) for n, pair in enumerate(rows(90))]
    recipe = Recipe(
        name="doors",
        task="extraction",
        model=str(toy_model(folder / "model")),
        system="",
        method="full",
        dtype="float32",
        learning_rate=3e-3,
        batch_size=8,
        accumulation=1,
        epochs=15,
        evals_per_epoch=1,
        early_stopping=0,
        max_new_tokens=48,
        max_length=512,
    )
    run = train(recipe, split(records, 0.1, 0.2, 0), folder / "run")
    (artifact,) = export(run, folder / "exports", kinds=("merged",))
    with serving(artifact) as url:
        yield run, artifact, OpenAI(base_url=url + "/v1", api_key="none")


def test_prompts_are_those_of_training(served):
    run, artifact, _ = served
    engine = load_for_generation(artifact)
    for row in run.splits.test:
        assert engine.prompt(list(row.messages), row.tools) == prompt_for(engine.tokenizer, row, "")
    assert engine.prompt(list(row.messages)) != engine.prompt(list(row.messages), row.tools)


def create(served, row, **more):
    _, artifact, client = served
    told = {
        "model": artifact.name,
        "messages": list(row.messages),
        "tools": list(row.tools),
        "max_tokens": 64,
    }
    return client.chat.completions.create(**told | more)


def test_answers_come_back_as_the_run_gave_them_whole_and_streamed(served):
    run, called = served[0], 0
    for row, answer in zip(*golden_answers(run, 12)):
        choice, wanted = create(served, row).choices[0], parse_calls(answer.text)
        deltas = [event.choices[0].delta for event in create(served, row, stream=True)]
        streamed = "".join(delta.content or "" for delta in deltas)
        parts = [part.function for delta in deltas for part in delta.tool_calls or ()]
        if wanted is None:  # a toy: some of its calls are no JSON, and stay text
            assert (choice.message.content, choice.message.tool_calls) == (answer.text, None)
            assert (streamed, parts) == (answer.text, [])
            continue
        called += 1
        assert (
            choice.finish_reason == "tool_calls" and (choice.message.content or "") == streamed == wanted[0]
        )
        for got in ([call.function for call in choice.message.tool_calls], parts):
            assert [{"name": c.name, "arguments": json.loads(c.arguments)} for c in got] == wanted[1]
    assert called >= 3, "the toy did not learn to call: nothing was tested"


def test_the_conversation_goes_on_after_a_call(served):
    run, artifact, _ = served
    row, engine = run.splits.test[0], load_for_generation(artifact)
    call = {"name": "open_door", "arguments": {"door": "hours"}}
    said = {
        "id": "call_1",
        "type": "function",
        "function": call | {"arguments": json.dumps(call["arguments"])},
    }
    turns = [*row.messages, {"role": "assistant", "content": None, "tool_calls": [said]}]
    turns.append({"role": "tool", "tool_call_id": "call_1", "content": "open"})
    usage = create(served, replace(row, messages=tuple(turns))).usage
    trained = (*row.messages, {"role": "assistant", "content": "", "tool_calls": [{"function": call}]})
    trained = replace(row, messages=(*trained, {"role": "tool", "content": "open"}))
    ids = prompt_for(engine.tokenizer, trained)
    assert usage.prompt_tokens == len(ids)
    assert engine.prompt(turns, row.tools) == ids


def test_without_tools_a_call_is_text(served):
    row = served[0].splits.test[0]
    choice = create(served, row, tool_choice="none").choices[0]
    assert choice.message.tool_calls is None and choice.finish_reason in ("stop", "length")
