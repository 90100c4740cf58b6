"""Exports of a toy run: proven, complete, bound to their base by hash, and the adapter alone as llama.cpp reads it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard

from ftnb.data import Record, split
from ftnb.deploy import (
    KINDS,
    Artifact,
    adapted,
    base_gguf,
    base_of,
    export,
    inspect_export,
    merge,
    open_gguf,
    open_gguf_lora,
    write_gguf,
    write_gguf_lora,
)
from ftnb.evaluate import evaluate, predict
from ftnb.foreign import base_identity
from ftnb.format import prompt_for
from ftnb.model import load_tokenizer, quiet
from ftnb.package import About, find_leaks, go_render, modelfile, ollama_template, serve_notes
from ftnb.plan import InputError, Recipe
from ftnb.train import train
from toys import rows, toy_model

PLAIN = {"type_k": 0, "type_v": 0, "logits_all": True}  # llama.cpp's memory in float32


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deploy")
    records = [
        Record(f"r{n}", ({"role": "user", "content": text},), label)
        for n, (text, label) in enumerate(rows(72))
    ]
    recipe = Recipe(
        name="toy",
        task="classification",
        model=str(toy_model(folder / "base")),
        system="Name the kind.",
        dtype="float32",
        learning_rate=3e-3,
        batch_size=8,
        accumulation=1,
        epochs=2,
        evals_per_epoch=1,
        max_new_tokens=4,
        max_length=256,
        r=4,
        alpha=8,
    )
    made = train(recipe, split(records, 0.1, 0.2, 0), folder / "run")
    tokenizer = load_tokenizer(made.adapter_dir)
    answers = predict(adapted(made), tokenizer, list(made.splits.test), recipe)
    evaluate(answers, "classification", "tuned").save(made.dir / "reports" / "tuned.json")
    return made


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    about = About(data_licence="cc0-1.0", licence="mit", use="To test exports.")
    return {a.kind: a for a in export(run, kinds=KINDS, about=about)}


def logits(run, model=None, n=3):
    tokenizer = load_tokenizer(run.adapter_dir)
    prompts = [prompt_for(tokenizer, r, run.recipe.system) for r in run.splits.test[:n]]
    model = model or adapted(run)
    with torch.no_grad():
        return prompts, [model(torch.tensor([ids])).logits[0].float() for ids in prompts]


def heard(llm, prompts):
    found = []
    for ids in prompts:
        llm.reset()
        llm.eval(ids)
        found.append(torch.tensor(llm.scores[: len(ids)].copy()))
    llm.close()
    return found


def gap(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def test_the_run_knows_the_hash_of_its_base(run):
    assert run.metrics["base_sha256"] == base_identity(Path(run.recipe.model))


def test_a_run_on_another_base_does_not_resume(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.dir, copy, ignore=shutil.ignore_patterns("exports"))
    (copy / "run.json").unlink()
    (copy / "base.json").write_text(json.dumps("0" * 64))
    with pytest.raises(InputError, match="was begun on .* with sha256 000000000000"):
        train(run.recipe, run.splits, copy)


def test_merging_onto_another_base_is_refused_by_hash(run, tmp_path):
    other = Path(shutil.copytree(run.recipe.model, tmp_path / "base"))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1  # one bit of one weight: names and shapes are the same
    (other / "model.safetensors").write_bytes(data)
    wrong = replace(run, recipe=run.recipe.replace(model=str(other)))
    for refuses in (merge, adapted, lambda r: export(r, tmp_path / "out", kinds=("adapter",))):
        with pytest.raises(InputError, match="was trained on .* name the right base"):
            refuses(wrong)
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_qlora_adapter_belongs_to_the_unpacked_base(run):
    as_qlora = replace(run, recipe=run.recipe.replace(method="qlora"))
    _, wanted = logits(as_qlora)
    right, wrong = (logits(run, merge(r))[1] for r in (as_qlora, run))
    assert gap(wanted, right) < gap(wanted, wrong) / 10


def test_every_kind_is_whole_and_names_nothing_of_this_machine(run, exports):
    assert list(exports) == list(KINDS)
    for kind, artifact in exports.items():
        assert {"README.md", "SERVE.md", "chat_template.jinja"} <= set(artifact.manifest["files"])
        assert ("Modelfile" in artifact.manifest["files"]) == kind.startswith("gguf")
        assert find_leaks(artifact.dir) == []
        base = artifact.manifest["base"]
        assert base == {"model": "base", "revision": None, "sha256": run.metrics["base_sha256"]}
        assert str(run.dir.parent) not in (artifact.dir / "manifest.json").read_text("utf-8")
        assert artifact.manifest["report"]["n"] == len(run.splits.test)
    assert inspect_export(exports["gguf-lora"].dir) == []


def test_a_leak_stops_the_export(run, tmp_path):
    leaky = replace(run, recipe=run.recipe.replace(system="Key: sk-" + "aB3" * 10))
    with pytest.raises(InputError, match="paths or keys would go along"):
        export(leaky, tmp_path, kinds=("adapter",))
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize("name", ["README.md", "SERVE.md", "Modelfile", "adapter.gguf"])
def test_a_changed_file_is_named(exports, tmp_path, name):
    folder = Path(shutil.copytree(exports["gguf-lora"].dir, tmp_path / "copy"))
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name} changed after it was exported"):
        Artifact.load(folder)


def test_the_card_says_what_was_measured(run, exports):
    report = json.loads((run.dir / "reports" / "tuned.json").read_text("utf-8"))
    for kind, artifact in exports.items():
        card = ModelCard.load(artifact.dir / "README.md")
        card_numbers = {r.metric_type: r.metric_value for r in card.data.eval_results}
        assert card_numbers == {k: round(e["value"], 4) for k, e in report["metrics"].items()}
        for e in report["metrics"].values():
            assert (
                f"| {e['value']:.3f} | {e['low']:.3f} to {e['high']:.3f} | {e['n']:,} {e['unit']} |"
                in card.text
            )
        assert card.data.license == "mit" and "Licence of the rows: cc0-1.0" in card.text
        assert card.data.library_name == {"adapter": "peft", "merged": "transformers"}.get(kind, "gguf")
        assert "To test exports." in card.text and "Limits" in card.text


def test_what_nobody_stated_is_not_invented(run, tmp_path):
    (artifact,) = export(run, tmp_path, kinds=("adapter",))
    card = ModelCard.load(artifact.dir / "README.md")
    assert card.data.license is None and "Licence of the rows: not stated" in card.text


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_adapter_as_gguf_computes_what_peft_computes(run, tmp_path, family):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    tokenizer, shape = (
        load_tokenizer(run.adapter_dir),
        dict(
            vocab_size=49_152,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
    )
    kinds = {
        "llama": (LlamaForCausalLM, LlamaConfig(**shape, num_key_value_heads=2)),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config(**shape, num_key_value_heads=2, head_dim=32)),
    }
    torch.manual_seed(0)
    model_class, config = kinds[family]
    toy = model_class(config).eval()
    for p in toy.parameters():
        p.data = p.data * 8 if p.ndim > 1 else p.data
    with quiet():
        toy.save_pretrained(tmp_path / "base")
        write_gguf(toy, tokenizer, tmp_path / "base.gguf", "float32")
        lora = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
        tuned = get_peft_model(toy, lora).eval()
        tuned.save_pretrained(tmp_path / "adapter")
    write_gguf_lora(tmp_path / "adapter", tmp_path / "base", tmp_path / "adapter.gguf")
    ids = torch.randint(20, 49_152, (60,)).tolist()
    with torch.no_grad():
        wanted = [tuned(torch.tensor([ids])).logits[0]]
    with torch.no_grad(), tuned.disable_adapter():
        plain = [tuned(torch.tensor([ids])).logits[0]]
    got = heard(
        open_gguf(tmp_path / "base.gguf", 128, lora_path=str(tmp_path / "adapter.gguf"), **PLAIN), [ids]
    )
    assert gap(wanted, got) < 1e-3 < gap(wanted, plain) / 100


def test_no_weights_are_repacked_for_amx():
    import llama_cpp

    from ftnb.deploy import _leave_amx_out, llama_library

    library = SimpleNamespace(llama_model_default_params=llama_cpp.llama_model_default_params)
    _leave_amx_out(library)
    assert not library.llama_model_default_params().use_extra_bufts
    if b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info():  # here the kernels are, and would be used
        assert not llama_library().llama_cpp.llama_model_default_params().use_extra_bufts


def test_the_exported_gguf_adapter_answers_like_the_run(run, exports):
    prompts, wanted = logits(run)
    got = heard(open_gguf_lora(exports["gguf-lora"], 256, **PLAIN), prompts)
    assert gap(wanted, got) < 0.05  # the base file is F16
    assert all((a.argmax(1) == b.argmax(1)).float().mean() > 0.9 for a, b in zip(wanted, got))


def test_a_gguf_adapter_needs_its_own_base(run, exports, tmp_path):
    artifact = exports["gguf-lora"]
    assert base_of(artifact) == Path(run.recipe.model)
    away = Artifact.load(shutil.copytree(artifact.dir, tmp_path / "away" / "from" / "here"))
    with pytest.raises(InputError, match="is not the base it was made for"):
        base_of(away)
    file = base_gguf(run.recipe.model)
    assert file == base_gguf(run.recipe.model) and str(file.parent.name).startswith(
        run.metrics["base_sha256"][:16]
    )


@pytest.mark.parametrize(
    "odd", [{"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"rank_pattern": {"q": 2}}]
)
def test_an_adapter_that_is_more_than_lora_gets_no_gguf(run, tmp_path, odd):
    folder = Path(shutil.copytree(run.adapter_dir, tmp_path / "adapter"))
    settings = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(settings | odd))
    with pytest.raises(InputError, match="has no place in a GGUF file"):
        write_gguf_lora(folder, Path(run.recipe.model), tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_ollama_gets_the_prompts_of_training(run):
    tokenizer, system = load_tokenizer(run.adapter_dir), run.recipe.system
    template, cuts = ollama_template(tokenizer, system)
    assert not cuts
    for record in run.splits.test:
        turns = [{"Role": m["role"], "Content": m["content"]} for m in record.messages]
        text = go_render(template, {"System": system, "Messages": turns})
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == prompt_for(tokenizer, record, system)
    said = modelfile(tokenizer, run.recipe)
    assert f'SYSTEM """{system}"""' in said and 'PARAMETER stop "<|im_end|>"' in said


@pytest.mark.parametrize(
    "planted",
    ["<|im_end|>", "<|im_end|>\n\n", "<|im_end|> \n"],
    ids=["newline gone", "newline doubled", "space added"],
)
def test_a_template_that_differs_by_one_character_is_found(run, planted):
    from ftnb.package import _TEXTS, _differs

    tokenizer = load_tokenizer(run.adapter_dir)
    template, _ = ollama_template(tokenizer)
    assert _differs(tokenizer, template, "", _TEXTS) == ""
    assert "in training" in _differs(tokenizer, template.replace("<|im_end|>\n", planted), "", _TEXTS)


def test_a_template_that_counts_turns_gets_no_modelfile(run):
    tokenizer = load_tokenizer(run.adapter_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ loop.index }} {{ m.role }}]{{ m.content }}{% endfor %}>"
    )
    with pytest.raises(InputError, match="cannot be written in Go's language"):
        modelfile(tokenizer, run.recipe)


@pytest.mark.parametrize(("r", "rank"), [(1, 1), (4, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_vllm_gets_a_rank_it_takes(r, rank):
    notes = serve_notes(Recipe(name="x", r=r), "adapter", "who/what")
    assert f"vllm serve who/what --enable-lora --lora-modules x-adapter=. --max-lora-rank {rank} " in notes


def test_vllm_gets_no_adapter_of_a_rank_it_does_not_take():
    assert "vllm" not in serve_notes(Recipe(name="x", r=600), "adapter", "who/what").split("## Check")[0]


def test_a_full_run_has_no_adapter(run, tmp_path):
    full = replace(run, recipe=run.recipe.replace(method="full"))
    for kind in ("adapter", "gguf-lora"):
        with pytest.raises(InputError, match="has no adapter to export"):
            export(full, tmp_path, kinds=(kind,))
