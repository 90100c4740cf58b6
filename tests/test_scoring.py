"""Labels scored on a trie and JSON under a grammar: equal to the plain way on many architectures, and always valid."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from ftnb import scoring
from ftnb.data import store_records
from ftnb.evaluate import frame_schema, json_object, predict
from ftnb.forgetting import can_reuse
from ftnb.format import encode, encode_answer, prompt_for, set_template, turn_end
from ftnb.model import Generation, generate
from ftnb.plan import InputError, Recipe
from ftnb.scoring import (
    JsonGrammar,
    best_label,
    count_reads,
    generate_json,
    greedy_label,
    label_mass,
    label_trie,
    normalised,
    predict_json,
    predict_labels,
    score_labels,
)
from ftnb.train import labelled_loss
from toys import TINY

LABELS = [
    "card",
    "card_lost",
    "card_lost_abroad",
    "cash",
    "cash at an atm",
    "refund",
    "top up",
    "top up failed",
    "é",
]
RECIPE = Recipe(task="classification", system="Name the intent.", max_new_tokens=12)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def records():
    return store_records()[::9]


@pytest.fixture(scope="module")
def tokenizer(records):
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator([t for r in records for t in (r.text, r.completion)], made)
    return set_template(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>"))


@pytest.fixture(scope="module")
def prompts(records, tokenizer):
    return [prompt_for(tokenizer, r, RECIPE.system) for r in records[:5]]


SHAPE = {"vocab_size": 500, **TINY}
CONFIGS = {
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama, one group a head": LlamaConfig(**SHAPE | {"num_key_value_heads": 4}, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral, window": MistralConfig(**SHAPE, sliding_window=16),
    "gemma2, capped logits": Gemma2Config(**SHAPE, sliding_window=16, final_logit_softcapping=5.0),
}


def toy(config, seed=0, sharp=1.0):
    "Random weights; the sharper, the surer the model is of what it says."
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sharp)
    return model


@pytest.fixture(scope="module")
def taught(tokenizer, records):
    "A toy that has learnt a few frames by heart, and none of the others."
    model, known = (
        toy(LlamaConfig(**SHAPE | {"hidden_size": 64, "head_dim": 16}, tie_word_embeddings=True)),
        records[:8],
    )
    rows = [encode(tokenizer, r, "Frame.") for r in known]
    wide = max(len(r.input_ids) for r in rows)
    ids = torch.tensor([[*r.input_ids, *[0] * (wide - len(r.labels))] for r in rows])
    graded = torch.tensor([[*r.labels, *[-100] * (wide - len(r.labels))] for r in rows])
    mask = torch.tensor([[int(k < len(r.labels)) for k in range(wide)] for r in rows])
    adam = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for _ in range(90):
        loss = labelled_loss(model, {"input_ids": ids, "labels": graded, "attention_mask": mask})
        loss.backward()
        adam.step()
        adam.zero_grad()
    assert loss.item() < 0.5
    return model


def alone(model, tokenizer, prompts, labels):
    "Prompt and label through the whole model, one row at a time: what everything else is held against."
    table = []
    for prompt in prompts:
        for label in labels:
            answer = [*encode_answer(tokenizer, label)[1], *turn_end(tokenizer)]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float()
            table.append(logits.log_softmax(-1)[range(len(answer)), answer].sum().item())
    return np.array(table).reshape(len(prompts), -1)


def masked_greedy(model, prompt, rows):
    "Greedy decoding, one token at a time, among the tokens with which some label goes on."
    said = ()
    while said not in rows:
        may = sorted({row[len(said)] for row in rows if row[: len(said)] == said})
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *said]])).logits[0, -1]
        said = (*said, max(may, key=lambda t: logits[t].item()))
    return rows.index(said)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sharp", [1.0, 60.0])
def test_scores_search_and_greedy_are_those_of_the_plain_way(name, sharp, tokenizer, prompts):
    model = toy(CONFIGS[name], sharp=sharp)
    assert can_reuse(model) == (name not in ("mistral, window", "gemma2, capped logits"))
    want = alone(model, tokenizer, prompts, LABELS)
    trie = label_trie(tokenizer, LABELS)
    bound = 1e-5 * abs(want).max()
    for batch, nodes in ((8, 128), (2, 3), (1, 1)):
        assert abs(score_labels(model, tokenizer, prompts, trie, batch, nodes) - want).max() <= bound
    found = best_label(model, tokenizer, prompts, trie, batch_size=3)
    assert [label for label, _ in found] == [LABELS[k] for k in want.argmax(1)]
    assert abs(np.array([p for _, p in found]) - want.max(1)).max() <= bound
    greedy = [LABELS[masked_greedy(model, p, trie.rows)] for p in prompts]
    assert greedy_label(model, tokenizer, prompts, trie, batch_size=3) == greedy


def test_the_search_stops_early_for_a_sure_model_and_is_bounded_for_an_unsure_one(
    taught, tokenizer, records, monkeypatch
):
    labels = sorted({r.completion for r in records})
    asked, trie = [prompt_for(tokenizer, r, "Frame.") for r in records[:8]], label_trie(tokenizer, labels)
    with count_reads(taught) as whole:
        score_labels(taught, tokenizer, asked, trie)
    with count_reads(taught) as sure:
        monkeypatch.setattr(scoring, "READ", 10_000)
        best_label(taught, tokenizer, asked, trie)
    assert sure.tokens < 0.5 * whole.tokens
    monkeypatch.setattr(scoring, "READ", 5)
    model = toy(CONFIGS["llama, tied"], sharp=0.01)
    with count_reads(model) as unsure:
        best_label(model, tokenizer, asked, trie)
    assert unsure.tokens <= 1.3 * whole.tokens + 8 * 5
    want = score_labels(taught, tokenizer, asked, trie)
    for limit in (0, 1, 2, 7, 30):
        monkeypatch.setattr(scoring, "READ", limit)
        found = best_label(taught, tokenizer, asked, trie, batch_size=3)
        assert [label for label, _ in found] == [labels[k] for k in want.argmax(1)]
        assert abs(np.array([p for _, p in found]) - want.max(1)).max() < 1e-4


def test_an_adapter_is_scored_as_it_answers(tokenizer, prompts):
    model = get_peft_model(
        toy(CONFIGS["llama, tied"]), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.train()
    before = torch.random.get_rng_state()
    found = score_labels(model, tokenizer, prompts, LABELS)
    assert model.training and torch.equal(torch.random.get_rng_state(), before)
    model.eval()
    assert abs(found - alone(model, tokenizer, prompts, LABELS)).max() < 1e-4
    with model.disable_adapter():
        assert abs(found - alone(model, tokenizer, prompts, LABELS)).max() > 1e-3


def test_bfloat16_and_float64_weights_are_scored_too(tokenizer, prompts):
    exact = score_labels(toy(CONFIGS["qwen3"]).double(), tokenizer, prompts, LABELS)
    near = score_labels(toy(CONFIGS["qwen3"]), tokenizer, prompts, LABELS)
    rough = score_labels(toy(CONFIGS["qwen3"]).bfloat16(), tokenizer, prompts, LABELS)
    assert 0 < abs(near - exact).max() < 1e-4 and abs(rough - exact).max() < 0.5


def test_a_prompt_without_a_shared_start_is_padded_at_the_front_and_stays_finite(tokenizer, prompts):
    model, mixed = toy(CONFIGS["llama, tied"]), [prompts[0], prompts[1][5:], prompts[2][9:], [7]]
    found = score_labels(model, tokenizer, mixed, LABELS)
    assert np.isfinite(found).all()
    assert abs(found - alone(model, tokenizer, mixed, LABELS)).max() < 1e-4
    assert [x for x, _ in best_label(model, tokenizer, mixed, LABELS)] == [LABELS[k] for k in found.argmax(1)]
    rows = label_trie(tokenizer, LABELS).rows
    assert greedy_label(model, tokenizer, mixed, LABELS) == [
        LABELS[masked_greedy(model, p, rows)] for p in mixed
    ]


def test_a_label_that_begins_another_is_a_label(tokenizer, prompts):
    trie = label_trie(tokenizer, ["card", "card_lost"])
    assert len(set(trie.ends)) == 2 and not set(trie.ends) & set(trie.children)
    assert [[trie.tokens[k] for k in trie.path(end)] for end in trie.ends] == [list(r) for r in trie.rows]
    chosen = set()
    for seed in range(12):
        model = toy(CONFIGS["llama, tied"], seed, sharp=60.0)
        with torch.no_grad():  # a bias towards or against the end of turn
            model.get_output_embeddings().weight[turn_end(tokenizer)[-1]] *= (-1) ** seed * 3
        chosen |= set(greedy_label(model, tokenizer, prompts, trie))
    assert chosen == {"card", "card_lost"}
    assert [x for x, _ in best_label(model, tokenizer, prompts[:2], ["card"])] == ["card", "card"]
    assert greedy_label(model, tokenizer, prompts[:2], ["card"]) == ["card", "card"]


def test_training_and_scoring_see_the_same_tokens(tokenizer, records):
    record = replace(records[0], completion="card_lost")
    row = encode(tokenizer, record, RECIPE.system)
    trie = label_trie(tokenizer, ["card_lost"])
    assert row.input_ids == (*prompt_for(tokenizer, record, RECIPE.system), *trie.rows[0])
    model = toy(CONFIGS["llama, tied"])
    ids, graded = torch.tensor([row.input_ids]), torch.tensor([row.labels])
    batch = {"input_ids": ids, "labels": graded, "attention_mask": torch.ones_like(ids)}
    loss = labelled_loss(model, batch).item() * len(trie.rows[0])
    prompt = prompt_for(tokenizer, record, RECIPE.system)
    assert score_labels(model, tokenizer, [prompt], trie)[0, 0] == pytest.approx(-loss, abs=1e-4)


@pytest.mark.parametrize(
    "labels, says",
    [
        ([], "give at least one"),
        (["a", ""], "a text that says something; got ''"),
        (["a", None], "got None"),
        (["a", "b", "a"], "'a' and 'a' have the same tokens"),
    ],
)
def test_bad_labels_are_named(labels, says, tokenizer):
    with pytest.raises(InputError, match=says):
        label_trie(tokenizer, labels)


def test_prompts_that_leave_no_room_are_named(tokenizer, prompts):
    model = toy(CONFIGS["llama, tied"])
    for ask in (score_labels, best_label, greedy_label):
        with pytest.raises(InputError, match="prompt 1: 0 tokens"):
            ask(model, tokenizer, [prompts[0], []], LABELS)
        with pytest.raises(InputError, match="prompt 0: 512 tokens; this model takes 1 to"):
            ask(model, tokenizer, [[5] * 512], LABELS)
        assert len(ask(model, tokenizer, [], LABELS)) == 0


def test_means_and_mass(tokenizer):
    trie = label_trie(tokenizer, ["a", "abcd efgh ijkl"])
    scores = np.log([[0.5, 0.25]])
    assert label_mass(scores) == pytest.approx([0.75])
    assert label_mass(np.array([[-2000.0, -2000.0]])) == pytest.approx([0.0])
    assert normalised(scores, trie, "sum").argmax(1) == [0] and normalised(scores, trie).argmax(1) == [1]
    assert normalised(scores, trie, "character")[0, 1] == pytest.approx(np.log(0.25) / 14)
    assert normalised(scores, trie)[0, 1] == pytest.approx(np.log(0.25) / len(trie.rows[1]))
    with pytest.raises(InputError, match="by must be one of sum, token, character"):
        normalised(scores, trie, "word")


@pytest.mark.parametrize("by", ["best", "greedy", "token", "character"])
def test_every_answer_is_a_label_and_the_right_rule_chose_it(by, tokenizer, records):
    model, rows = (
        toy(CONFIGS["llama, tied"], sharp=20.0),
        [replace(r, completion="cash") for r in records[:9]],
    )
    found = predict_labels(model, tokenizer, rows, RECIPE, LABELS, by)
    assert [p.id for p in found] == [r.id for r in rows] and all(p.stopped for p in found)
    asked = [prompt_for(tokenizer, r, RECIPE.system) for r in rows]
    trie, scores = label_trie(tokenizer, LABELS), alone(model, tokenizer, asked, LABELS)
    want = {
        "best": lambda: scores.argmax(1),
        "greedy": lambda: [masked_greedy(model, p, trie.rows) for p in asked],
        "token": lambda: (scores / [len(r) for r in trie.rows]).argmax(1),
        "character": lambda: (scores / [len(label) for label in LABELS]).argmax(1),
    }[by]()
    assert [p.output for p in found] == [LABELS[k] for k in want]


def test_an_example_from_the_test_is_refused(tokenizer, records):
    model = toy(CONFIGS["llama, tied"])
    with pytest.raises(InputError, match="is one of the test records"):
        predict_labels(model, tokenizer, records[:3], RECIPE, LABELS, shots=records[1:2])
    with pytest.raises(InputError, match="by must be one of"):
        predict_labels(model, tokenizer, records[:3], RECIPE, LABELS, by="luck")


# JSON

SCHEMAS = {
    "numbers": {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "x": {"type": "number"}, "ok": {"type": "boolean"}},
        "required": ["n", "x", "ok"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "object", "properties": {"k": {"enum": ["p", "pq"]}},
                                                         "required": ["k"], "additionalProperties": False}, "minItems": 2}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "text": {"type": "object", "properties": {"t": {"type": "string"}}, "required": ["t"], "additionalProperties": False},
}  # fmt: skip


@pytest.mark.parametrize("limit", [1, 5, 24])
@pytest.mark.parametrize("name", ["frame", *SCHEMAS])
def test_random_models_write_nothing_but_the_schema(name, limit, tokenizer, records, prompts):
    schema = frame_schema(records) if name == "frame" else SCHEMAS[name]
    grammar, check = JsonGrammar(tokenizer, schema), Draft202012Validator(schema)
    for seed in range(4):
        model = toy(CONFIGS["llama, tied"], seed, sharp=(1.0, 30.0)[seed % 2])
        found = generate_json(model, tokenizer, prompts, limit, 3, grammar)
        assert all(check.is_valid(json.loads(g.text)) for g in found)
        assert all(len(g.ids) <= limit or not g.stopped for g in found)
    assert generate_json(model, tokenizer, [], limit, 3, grammar) == []


def test_every_place_to_stop_has_an_end(tokenizer, records):
    schema = frame_schema(records)
    grammar, check = JsonGrammar(tokenizer, schema), Draft202012Validator(schema)
    text = max((r.completion for r in records), key=len)
    text = text[:-4] + ' \\u00e9 \\" \\n ü 😀"}]}'
    assert check.is_valid(json.loads(text))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for n in range(len(ids) + 1):
        matcher = grammar.first.deep_copy()
        assert matcher.consume_tokens(ids[:n])
        whole = tokenizer.decode([*ids[:n], *grammar.close(matcher)])
        assert check.is_valid(json.loads(whole)), whole


def test_bad_schemas_are_named(tokenizer, monkeypatch):
    with pytest.raises(InputError, match="schema: llguidance cannot follow it"):
        JsonGrammar(tokenizer, {"type": "no such type"})
    monkeypatch.setattr(scoring, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'ftnb\[grammar\]'"):
        JsonGrammar(tokenizer, {"type": "object"})


def test_valid_answers_are_not_moved(taught, tokenizer, records):
    recipe, schema = (
        RECIPE.replace(task="extraction", system="Frame.", max_new_tokens=64),
        frame_schema(records),
    )
    free = predict(taught, tokenizer, records[:40], recipe)
    bound = predict_json(taught, tokenizer, records[:40], recipe, schema)
    check = Draft202012Validator(schema)
    valid = [p.stopped and check.is_valid(json_object(p.output)) for p in free]
    assert sum(valid) >= 4
    assert [b.output for b, ok in zip(bound, valid) if ok] == [f.output for f, ok in zip(free, valid) if ok]
    assert all(check.is_valid(json.loads(b.output)) for b in bound)


def test_greedy_labels_are_the_free_answers_where_those_are_labels(taught, tokenizer, records):
    recipe, known = (
        RECIPE.replace(system="Frame.", max_new_tokens=64),
        sorted({r.completion for r in records}),
    )
    free = predict(taught, tokenizer, records[:20], recipe)
    bound = predict_labels(taught, tokenizer, records[:20], recipe, known, "greedy")
    same = [(f.output, b.output) for f, b in zip(free, bound) if f.output in known]
    assert len(same) >= 4 and all(a == b for a, b in same)
    assert {b.output for b in bound} <= set(known)


# Batches


def test_batches_share_one_prefix_and_answer_as_single_rows(taught, tokenizer, records, prompts):
    asked = [prompt_for(tokenizer, r, "Frame.") for r in records[:12]]
    alone = [generate(taught, tokenizer, [p], 20)[0] for p in asked]
    for batch in (1, 5, 12):
        with count_reads(taught) as reads:
            assert generate(taught, tokenizer, asked, 20, batch) == alone
    short = sum(map(len, asked)) - 11 * 8
    assert reads.tokens < short + 12 * 20 + 12 * 30


def test_the_choice_of_tokens_is_the_callers(taught, tokenizer, prompts):
    seen = []

    def second(numbers, logits):
        seen.append(list(numbers))
        return logits.topk(2).indices[:, 1]

    found = generate(taught, tokenizer, prompts, 3, 2, choose=second)
    assert {n for row in seen for n in row} == set(range(len(prompts)))
    for prompt, answer in zip(prompts, found):
        with torch.no_grad():
            logits = taught(torch.tensor([prompt])).logits[0, -1]
        assert answer.ids[:1] == (logits.topk(2).indices[1].item(),)


def test_reads_are_counted(taught, tokenizer, prompts):
    with count_reads(taught) as reads, torch.no_grad():
        taught(torch.tensor([prompts[0]] * 3))
    assert (reads.tokens, reads.heads, reads.passes) == (3 * len(prompts[0]), 3 * len(prompts[0]), 1)
    with torch.no_grad():
        taught(torch.tensor([prompts[0]]))
    assert reads.passes == 1


@pytest.mark.slow
def test_the_default_model_scores_and_answers_as_row_by_row():
    from ftnb.model import DEFAULT_MODEL, load_model, load_tokenizer

    model, tokenizer = load_model(DEFAULT_MODEL, "float32"), load_tokenizer(DEFAULT_MODEL)
    intents = sorted({r.label for r in store_records()})
    asked = [prompt_for(tokenizer, r, "Name the intent.") for r in store_records()[:800:160]]
    scores = score_labels(model, tokenizer, asked, intents)
    want = alone(model, tokenizer, asked, intents)
    assert np.allclose(scores, want, rtol=5e-6, atol=0)  # float32; sums of up to 45
    assert (scores.argmax(1) == want.argmax(1)).all()
    assert [x for x, _ in best_label(model, tokenizer, asked, intents)] == [
        intents[k] for k in want.argmax(1)
    ]
    rows = label_trie(tokenizer, intents).rows
    assert greedy_label(model, tokenizer, asked, intents) == [
        intents[masked_greedy(model, p, rows)] for p in asked
    ]
    together = generate(model, tokenizer, asked, 12, 3)
    for prompt, answer in zip(asked, together):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        ids = tuple(t for t in out if t != tokenizer.eos_token_id)
        assert answer == Generation(tokenizer.decode(ids, skip_special_tokens=True), ids, answer.stopped)
