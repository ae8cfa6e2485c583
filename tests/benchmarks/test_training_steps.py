"""Training steps in `wavlm-fast bench`, of models and of adapters: verified, timed, and what they say they are."""

import pytest
import torch

from wavlm_fast.benchmarks.run import cases, rounds, verify

THEIRS, OURS = "transformers fp32", "wavlm_fast fp32"


def test_wrong_gradients_get_no_time(bench, monkeypatch):
    right = rounds.bound_step

    def bound_step(*args):
        call = right(*args)

        def wrong():
            found = call()
            next(iter(found.values())).mul_(1.01)
            return found

        return wrong

    ended = bench("--case", "train 1x0.5")
    assert ended.status == 0, ended
    names = {name for _, name in ended.rows}
    assert names == {THEIRS, OURS, "transformers bf16", "wavlm_fast bf16"}
    assert ended.rows["train 1x0.5", THEIRS]["ours_faster"]["rounds"] == 5
    usual = verify.bound_step
    assert usual is right
    monkeypatch.setattr(rounds, "bound_step", bound_step)
    ended = bench("--case", "train 1x0.5", only=("--provider", "wavlm_fast fp32"))
    (row,) = ended.rows.values()
    assert row["problem"].startswith("wrong: the gradient of ")
    assert row["seconds"] is None


@pytest.mark.parametrize("model", ["train", "lora"])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_training_step_is_what_it_says(tiny, model, fast, dtype):
    """Products in bfloat16 are autocast's, weights stay float32; of adapters' model nothing else learns or changes."""
    module = tiny(model).copy(cases.trained_in(dtype), fast=fast)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    seen = []
    module.model.encoder.register_forward_hook(
        lambda *args: seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
    )
    step = cases.bound_step(module, cases.CASES[f"{model} 1x0.5"].inputs(), dtype)
    found = step()
    assert seen == [dtype if dtype == torch.bfloat16 else False]
    learning = {name for name in before if ".up." in name or ".down." in name} if model == "lora" else {*before}
    assert found.keys() == learning - {"model.masked_spec_embed"}
    assert all(g.any() and g.dtype == before[name].dtype == cases.trained_in(dtype) for name, g in found.items())
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_adapters_are_verified_and_timed(bench):
    ended = bench("--case", "lora 1x0.5")
    assert ended.status == 0, ended
    assert {name for _, name in ended.rows} == {THEIRS, OURS, "transformers bf16", "wavlm_fast bf16"}
    assert all(row["problem"] is None and row["seconds"] for row in ended.rows.values())


def test_adapters_say_what_they_do(tiny):
    """transformers' attention reads the weight, ours calls the module."""
    adapter = tiny("lora").model.encoder.layers[1].attention.v_proj.double()
    x = torch.randn(3, adapter.base.in_features, dtype=torch.float64)
    wanted = torch.nn.functional.linear(x, adapter.weight, adapter.bias)
    torch.testing.assert_close(adapter(x), wanted)
    assert not torch.allclose(wanted, adapter.base(x))
