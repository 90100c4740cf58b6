"""Each of the guide's three methods trains, on a toy model: the adapter in float32, also on a 4-bit base."""

import pytest
import torch
from safetensors.torch import load_file

from ftnb.data import Record, Splits
from ftnb.plan import Recipe
from ftnb.train import load_run, train
from toys import rows, toy_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy_model(tmp_path_factory.mktemp("methods"))


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_method_is_one_word_of_the_recipe(method, model, tmp_path):
    made = [Record(f"r{n}", ({"role": "user", "content": t},), a, a) for n, (t, a) in enumerate(rows(48))]
    sizes = dict(batch_size=8, accumulation=1, epochs=2, evals_per_epoch=1, max_new_tokens=4, r=4, alpha=8)
    recipe = Recipe(task="classification", model=str(model), method=method, learning_rate=1e-2, **sizes)
    dtype = {} if method == "full" else {"dtype": "bfloat16"}
    run = train(recipe.replace(**dtype), Splits(made[:32], made[32:40], made[40:]), tmp_path / "run")
    losses = [h["loss"] for h in run.history if "loss" in h]
    assert losses[-1] < losses[0]
    saved = load_file(
        run.adapter_dir / ("model.safetensors" if method == "full" else "adapter_model.safetensors")
    )
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert method == "full" or any(t.abs().sum() > 0 for name, t in saved.items() if "lora_B" in name)
    tuned, _ = load_run(run)
    packed = [p for p in tuned.parameters() if getattr(p, "quant_state", None) is not None]
    assert bool(packed) == (method == "qlora")
