"""A whole tiny WavLM of each norm form on the Triton backend, forward and backward, against transformers in float64."""

import copy

import pytest
import torch
import transformers
from cases import DEVICE, DTYPES

import wavlm_fast
from wavlm_fast.sensitive import make_sensitive

FORMS = {"base": ("group", False), "large": ("layer", True)}
MODELS = {
    "base": ("base", transformers.WavLMModel, "last_hidden_state"),
    "large": ("large", transformers.WavLMModel, "last_hidden_state"),
    "x-vector": ("base", transformers.WavLMForXVector, "embeddings"),
}


def tiny(form, model=transformers.WavLMModel):
    norm, stable = FORMS[form]
    config = transformers.WavLMConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=48, conv_dim=(16, 16, 16),
        conv_kernel=(10, 3, 2), conv_stride=(5, 2, 2), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        num_buckets=16, max_bucket_distance=20, feat_extract_norm=norm, do_stable_layer_norm=stable, conv_bias=stable,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0,
        apply_spec_augment=False, tdnn_dim=(24, 40), tdnn_kernel=(3, 1), tdnn_dilation=(2, 1), xvector_output_dim=16,
    )  # fmt: skip
    return make_sensitive(model(config)).eval()


def run(model, output, waveform, mask):
    states = getattr(model(waveform, attention_mask=mask), output)
    states.square().mean(dtype=torch.promote_types(states.dtype, torch.float32)).backward()
    return states.detach().cpu(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("form", "model", "output"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cuda" else DTYPES[:1])
def test_matches_transformers(form, model, output, dtype):
    model = tiny(form, model).to(dtype)
    waveform = torch.randn(2, 420, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.ones(2, 420, dtype=torch.long)
    mask[1, 300:] = 0
    truth, true = run(copy.deepcopy(model).double(), output, waveform.double(), mask)
    plain, theirs = run(copy.deepcopy(model), output, waveform, mask)
    fast = wavlm_fast.accelerate(model).to(DEVICE)
    with wavlm_fast.use_backend("triton"):
        found, ours = run(fast, output, waveform.to(DEVICE), mask.to(DEVICE))
    eps = torch.finfo(dtype).eps
    forward, backward = (64, 512) if dtype == torch.float32 else (2, 32)  # roundings, where plain torch is lucky
    allowed = 2 * (plain - truth).abs().max() + forward * eps * truth.abs().max()
    assert (found - truth).abs().max() <= allowed
    assert ours.keys() == true.keys()
    for name in true:
        allowed = 2 * (theirs[name] - true[name]).abs().max() + backward * eps * true[name].abs().max() + 1e-6
        assert (ours[name] - true[name]).abs().max() <= allowed, name


@pytest.mark.parametrize(("form", "model", "output"), MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_writes_through_data_are_seen(form, model, output, monkeypatch):
    """A GPU is not asked for values, so nothing may be remembered of weights there."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))  # in the interpreter neither
    model = tiny(form, model).half()  # half precision has the most kernels
    waveform = torch.randn(2, 420, generator=torch.Generator().manual_seed(0)).half()
    fast = wavlm_fast.accelerate(copy.deepcopy(model)).to(DEVICE)

    def run_fast(subject):
        with wavlm_fast.use_backend("triton"):
            return getattr(subject(waveform.to(DEVICE)), output)

    first = run_fast(fast)
    for seed in range(2):
        make_sensitive(model, seed=seed + 1)
        for mine, theirs in zip(fast.parameters(), model.parameters(), strict=True):
            mine.data.copy_(theirs)
        found = run_fast(fast)
        assert torch.equal(found, run_fast(wavlm_fast.accelerate(copy.deepcopy(model)).to(DEVICE)))
        assert not torch.equal(found, first)
