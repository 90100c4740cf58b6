"""Speed with the same mathematics: the shared prefix gives the loss and the gradients of the plain batch, or stands aside."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from trl import SFTTrainer

import ftnb.train
from conftest import ROOT
from ftnb.data import Record, Splits, load
from ftnb.model import DEFAULT_MODEL, generate, load_tokenizer
from ftnb.plan import InputError, Recipe
from ftnb.train import Trainer, can_share, labelled_loss, make_trainer, share, shared_loss, train
from toys import TINY, lines, toy_model
from toys import rows as toy_rows

pytestmark = pytest.mark.usefixtures("one_thread")


SHAPE = {"vocab_size": 300, **TINY}
CONFIGS = {
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama, one group a head": LlamaConfig(**SHAPE | {"num_key_value_heads": 4}, tie_word_embeddings=False),
    "qwen2, untied": Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "qwen3, tied": Qwen3Config(**SHAPE, tie_word_embeddings=True),
}


def batch(prefix: int = 12, rows: int = 5) -> dict:
    "Rows of different length that begin alike, padded on the right."
    draw = torch.Generator().manual_seed(1)

    def tokens(n):
        return torch.randint(3, 300, (n,), generator=draw).tolist()

    head = tokens(prefix)
    parts = [(head + tokens(4 + n), tokens(2 + n % 3)) for n in range(rows)]
    return padded(parts)


def padded(parts) -> dict:
    width = max(len(p) + len(a) for p, a in parts)
    gaps = [width - len(p) - len(a) for p, a in parts]
    made = {
        "input_ids": [p + a + [0] * gap for (p, a), gap in zip(parts, gaps)],
        "labels": [[-100] * len(p) + a + [-100] * gap for (p, a), gap in zip(parts, gaps)],
        "attention_mask": [[1] * len(p + a) + [0] * gap for (p, a), gap in zip(parts, gaps)],
    }
    return {k: torch.tensor(v) for k, v in made.items()}


def model_of(config, dtype=torch.float32, **lora):
    "With an adapter that already does something; in float64 the norms, which models compute in float32, too."
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if dtype == torch.float64:
        for name, norm in list(model.named_modules()):
            if "RMSNorm" in type(norm).__name__:
                model.set_submodule(name, torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon))
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | lora
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).to(dtype).train()


def loss_and_gradients(loss_of, model, inputs):
    model.zero_grad()
    loss = loss_of(model, inputs)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def whole_loss(model, inputs):
    "All positions through the output layer; the ungraded ones left out by PyTorch's own loss."
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "dtype, bound, long", [(torch.float64, 1e-10, 640), (torch.float64, 1e-10, 0), (torch.float32, 1e-5, 640)]
)
def test_loss_and_every_gradient_are_those_of_the_plain_batch(name, dtype, bound, long, monkeypatch):
    monkeypatch.setattr(ftnb.train, "LONG", long)
    model = model_of(CONFIGS[name], dtype)
    assert can_share(model)
    for prefix in (0, 1, 12):
        inputs = batch(prefix)
        assert share(inputs).prefix == prefix
        (loss, plain), (our_loss, ours) = (
            loss_and_gradients(f, model, inputs) for f in (labelled_loss, shared_loss)
        )
        assert abs(loss - our_loss) <= bound * loss
        assert len(plain) == 2 * 14 and plain.keys() == ours.keys()
        for key, grad in plain.items():
            assert grad.norm() > 0 and (grad - ours[key]).norm() <= bound * grad.norm(), key


def test_the_graded_part_of_the_head_gives_the_loss_transformers_gives():
    for name, config in CONFIGS.items():
        model, inputs = (
            model_of(config, torch.float64),
            batch(12, 70),
        )  # more graded tokens than one step takes
        assert (inputs["labels"] != -100).sum() > 128
        (loss, plain), (our_loss, ours) = (
            loss_and_gradients(f, model, inputs) for f in (whole_loss, shared_loss)
        )
        assert abs(loss - our_loss) <= 1e-10 * loss, name
        assert all((g - ours[k]).norm() <= 1e-10 * g.norm() for k, g in plain.items()), name


def test_full_fine_tuning_gets_the_same_gradients_too():
    for name in ("llama, tied", "qwen2, untied"):
        model = model_of(CONFIGS[name]).unload().requires_grad_(True).train()
        (_, plain), (_, ours) = (loss_and_gradients(f, model, batch()) for f in (labelled_loss, shared_loss))
        assert all((g - ours[k]).norm() <= 1e-5 * g.norm() for k, g in plain.items())


def test_the_layout_of_a_batch_by_hand():
    inputs = padded([([7, 8, 9, 1], [5, 6]), ([7, 8, 9], [4])])
    made = share(inputs)
    assert made.prefix == 2  # the 9 stands before a graded token in the second row
    assert made.ids.tolist() == [[7, 8, 9, 1, 5, 6, 9, 4]]
    assert made.positions.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3]]
    assert made.targets.tolist() == [-100, -100, -100, 5, 6, -100, 4, -100]
    assert made.take.tolist() == [[2, 3, 4, 5], [6, 7, 0, 0]]
    assert made.back.tolist() == [0, 1, 2, 3, 4, 5]
    assert made.mask.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1] * 6]


@pytest.mark.parametrize(
    "parts, prefix",
    [
        ([([7, 8, 9, 1], [5, 6])] * 3, 3),  # the same row three times
        ([([7, 8, 9, 1], [5, 6])], 3),  # one row
        ([([3], [5, 6]), ([3], [4])], 0),  # graded from the second token on
        ([([1, 2, 3, 4, 5], [6]), ([9, 2, 3, 4, 5], [6])], 0),  # alike but for the first token
    ],
)
def test_odd_batches(parts, prefix):
    model, inputs = model_of(CONFIGS["llama, tied"], torch.float64), padded(parts)
    assert share(inputs).prefix == prefix
    (loss, plain), (our_loss, ours) = (
        loss_and_gradients(f, model, inputs) for f in (labelled_loss, shared_loss)
    )
    assert abs(loss - our_loss) < 1e-10 * loss
    assert all((g - ours[k]).norm() <= 1e-10 * g.norm() for k, g in plain.items())


def test_what_it_computes_is_the_same_bit_for_bit_each_time():
    model = model_of(CONFIGS["qwen3, tied"])
    (one, first), (two, second) = (loss_and_gradients(shared_loss, model, batch(12, 24)) for _ in range(2))
    assert one == two and all(torch.equal(g, second[k]) for k, g in first.items())


def test_the_models_own_attention_is_back_afterwards():
    model = model_of(CONFIGS["llama, tied"])
    before = model.config._attn_implementation, labelled_loss(model, batch()).item()
    shared_loss(model, batch())
    assert (model.config._attn_implementation, labelled_loss(model, batch()).item()) == before


def test_dropout_is_drawn_for_each_row_so_nothing_is_shared():
    model = model_of(CONFIGS["llama, tied"], lora_dropout=0.1)
    assert not can_share(model) and can_share(model.eval())


WINDOW = {"num_hidden_layers": 2, "sliding_window": 8}


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SHAPE | WINDOW),
        Gemma2Config(**SHAPE | WINDOW),
        Qwen2Config(**SHAPE | WINDOW, use_sliding_window=True, max_window_layers=1),
        MambaConfig(vocab_size=300, hidden_size=32, state_size=4, num_hidden_layers=2),
    ],
    ids=lambda c: c.model_type,
)
def test_windows_and_states_are_left_alone(config):
    assert not can_share(AutoModelForCausalLM.from_config(config).train())


def trainer_for(tmp_path, model=None, **changes):
    (tmp_path / "toy.jsonl").write_text(lines({"text": t, "label": a} for t, a in toy_rows(24)))
    records = tuple(load(tmp_path / "toy.jsonl").records)
    folder = toy_model(tmp_path / "model")
    recipe = Recipe(
        model=str(folder),
        system="Name the kind of message in one word.",
        batch_size=8,
        accumulation=1,
        **changes,
    )
    model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    splits = Splits(train=records[:16], val=records[16:], test=())
    return make_trainer(recipe, splits, tmp_path / "run", model, load_tokenizer(folder), [])


def first_batch(trainer):
    trainer.model_accepts_loss_kwargs = True
    return trainer.data_collator([trainer.train_dataset[i] for i in range(8)])


def called(monkeypatch, name):
    "How often a function of ftnb.train runs from here on."
    real, count = getattr(ftnb.train, name), []
    monkeypatch.setattr(ftnb.train, name, lambda *a, **k: (count.append(1), real(*a, **k))[1])
    return count


def test_gradient_and_validation_loss_are_those_of_plain_trl(tmp_path, monkeypatch):
    trainer, shared = trainer_for(tmp_path), called(monkeypatch, "shared_loss")
    trainer.args.prediction_loss_only = True
    found = {}
    for kind in (Trainer, SFTTrainer):
        trainer.__class__ = kind
        trainer.model.train()
        loss_of = functools.partial(trainer.compute_loss, num_items_in_batch=torch.tensor(40))
        loss, grads = loss_and_gradients(loss_of, trainer.model, first_batch(trainer))
        assert bool(shared) == (kind is Trainer)
        flat = torch.cat([g.flatten() for g in grads.values()])
        found[kind] = loss, flat, trainer.evaluate()["eval_loss"]
        shared.clear()
    (loss, ours, val), (trl_loss, trls, trl_val) = found[Trainer], found[SFTTrainer]
    assert abs(loss - trl_loss) < 1e-5 * trl_loss and abs(val - trl_val) < 1e-5 * trl_val
    assert (ours - trls).norm() < 1e-5 * trls.norm()


def test_a_layer_that_asks_for_more_gets_the_plain_loss(tmp_path, monkeypatch):
    trainer, shared = trainer_for(tmp_path), called(monkeypatch, "shared_loss")
    for layer in trainer.model.get_base_model().model.layers:
        layer.self_attn.attention_dropout = (
            0.1  # PyTorch's kernel draws it; nothing in the module list shows it
        )
    trainer.model.train()
    for _ in range(2):
        torch.manual_seed(0)
        loss = trainer.compute_loss(trainer.model, first_batch(trainer))
        torch.manual_seed(0)
        assert loss.item() == labelled_loss(trainer.model, first_batch(trainer)).item()
    assert len(shared) == 1 and not trainer.shares


def test_layers_that_keep_their_own_attention_are_noticed(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path)
    monkeypatch.setattr(ftnb.train, "SHARED", "sdpa")  # what a layer does that does not ask its config
    with pytest.raises(NotImplementedError, match="attention of its own"):
        shared_loss(trainer.model, first_batch(trainer))
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    assert not trainer.shares and loss.item() == labelled_loss(trainer.model, first_batch(trainer)).item()


def test_rows_padded_on_the_left_and_adapters_with_dropout_get_the_plain_loss(tmp_path, monkeypatch):
    trainer, shared = trainer_for(tmp_path, dropout=0.2), called(monkeypatch, "shared_loss")
    trainer.model.train()
    trainer.compute_loss(trainer.model, first_batch(trainer))
    assert not shared
    trainer.model.eval()
    left = {k: v.flip(1) for k, v in first_batch(trainer).items()}
    assert not left["attention_mask"][:, 0].all()
    trainer.compute_loss(trainer.model, left)
    assert not shared
    trainer.compute_loss(trainer.model, first_batch(trainer))
    assert shared


def made(tmp_path, name):
    text = toy_rows(44)
    records = [Record(f"r{n}", ({"role": "user", "content": t},), a, a) for n, (t, a) in enumerate(text)]
    model = tmp_path / "toy" if (tmp_path / "toy").exists() else toy_model(tmp_path / "toy")
    sizes = dict(batch_size=8, accumulation=1, epochs=2, evals_per_epoch=1, max_new_tokens=4, r=4, alpha=8)
    recipe = Recipe(task="classification", model=str(model), learning_rate=1e-2, dtype="float32", **sizes)
    return recipe, Splits(records[:28], records[28:36], records[36:]), tmp_path / name


def curve(run):
    return [h.get("loss", h.get("eval_loss")) for h in run.history]


def test_rows_laid_end_to_end_give_the_losses_of_padded_rows(tmp_path, monkeypatch):
    padded_rows, seen = train(*made(tmp_path, "padded")), []
    step = Trainer.training_step

    def look(self, model, inputs, *args):
        seen.append((len(inputs["input_ids"]), "attention_mask" in inputs))
        return step(self, model, inputs, *args)

    monkeypatch.setattr(Trainer, "training_step", look)
    monkeypatch.setattr(ftnb.train, "without_padding", lambda model: True)
    monkeypatch.setattr(
        ftnb.train, "END_TO_END", "sdpa"
    )  # on a CPU; it tells rows apart by positions as well
    end_to_end = train(*made(tmp_path, "end"))
    assert set(seen) == {(1, False)}
    assert curve(end_to_end) == pytest.approx(curve(padded_rows), abs=1e-4)
    assert max(curve(padded_rows)) - min(curve(padded_rows)) > 0.1


def test_rows_laid_end_to_end_are_named_when_their_loss_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(ftnb.train, "without_padding", lambda model: True)
    monkeypatch.setattr(ftnb.train, "END_TO_END", "sdpa")
    loss = Trainer.compute_loss
    monkeypatch.setattr(Trainer, "compute_loss", lambda *a, **k: loss(*a, **k) * float("inf"))
    with pytest.raises(
        InputError, match=r"before update 1: loss is inf on rows r\d+, r\d+, r\d+, r\d+ and 4 more"
    ):
        train(*made(tmp_path, "broken"))


@pytest.mark.gpu
def test_flash_attention_gives_the_losses_of_padded_rows(tmp_path, monkeypatch):
    pytest.importorskip("flash_attn")
    recipe, splits, out = made(tmp_path, "end")
    end_to_end = train(recipe.replace(dtype="bfloat16"), splits, out)
    monkeypatch.setattr(ftnb.train, "without_padding", lambda model: False)
    padded_rows = train(recipe.replace(dtype="bfloat16"), splits, tmp_path / "padded")
    assert curve(end_to_end) == pytest.approx(curve(padded_rows), rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(
    not (Path(os.environ.get("FTNB_SHARED") or ROOT.parent / "shared") / "data/banking77").is_dir(),
    reason="no Banking77 in shared/data",
)
def test_the_benchmark_runs(tmp_path):
    out, model = tmp_path / "speed.json", toy_model(tmp_path / "toy")
    command = [sys.executable, ROOT / "benchmarks/train.py", "--quick", "--dtype", "float32"]
    done = subprocess.run(
        [*command, "--model", model, "--out", out], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text("utf-8"))["short"]
    assert found["gradient difference"] < 1e-5
    assert [row["way"] for row in found["summary"]] == ["TRL as it ships", "TRL tuned by hand", "ftnb"]
    losses = [row["validation loss"] for row in found["summary"]]
    assert max(losses) < 1.01 * min(losses)
    assert found["floor"]["tokens"] < found["floor"]["padded_tokens"]


def test_a_frozen_head_is_not_copied_for_each_prompt():
    from torch.profiler import ProfilerActivity, profile

    model, tokenizer = model_of(CONFIGS["llama, tied"]), load_tokenizer(DEFAULT_MODEL)
    prompts = [[5, 6, 7 + n, *range(20, 24 + n)] for n in range(4)]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        generate(model, tokenizer, prompts, 3)
    shapes = [shape for e in seen.events() for shape in e.input_shapes]
    assert [4, 32] in shapes and [4, 1, 32] in shapes, "the batch was not seen"
    assert not [s for s in shapes if len(s) == 3 and s[-2:] == [32, 300]]
