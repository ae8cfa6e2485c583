"""No forward on a GPU waits for the device: that is what lets a CUDA graph capture it."""

from contextlib import nullcontext

import pytest
import torch
from device_only import Waits, no_gpu_needed, to_device
from microsoft_cases import fast, original
from wavlm_cases import FORMS, HEADS, MODELS, fast_model, ours_only, plain_model, ragged_mask, small_config

pytestmark = ours_only
triton = pytest.importorskip("triton")

from wavlm_fast import accelerate, forward_ragged  # noqa: E402
from wavlm_fast.backends.triton import TABLE  # noqa: E402
from wavlm_fast.benchmarks.gpu.compile import recording  # noqa: E402
from wavlm_fast.kernels._target import pretend  # noqa: E402
from wavlm_fast.modules import Attention, _masks, _packing  # noqa: E402


def forward(model, dtype=torch.float32, masked=False, **options):
    """The ops of one forward on a GPU that is not there, and the names of the kernels that it launches."""
    with no_gpu_needed(TABLE) as mode, pretend("hopper"), recording() as launches:
        model = to_device(model, dtype)
        waveform = torch.empty(2, 600, dtype=dtype, device="cuda")
        mask = torch.ones(2, 600, dtype=torch.long, device="cuda") if masked else None
        out = model(waveform, attention_mask=mask, **options)
        assert out[0].device.type == "cuda"
    return mode.ran, {launch.name for launch in launches}


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_inference(name, form, masked):
    with torch.no_grad():
        ops, kernels = forward(fast_model(name, small_config(form)), torch.bfloat16, masked)
    assert {"waveform_conv", "strided_conv", "gated_attention", "position_gate", "positional_conv"} <= ops
    assert "gated_attention_fwd_kernel" in kernels
    assert ("stats_pool" in ops) == (name == "WavLMForXVector")


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", MODELS)
def test_with_gradients_in_float32(name, masked):
    ops, _ = forward(fast_model(name), masked=masked)
    assert "gated_attention" in ops


@pytest.mark.parametrize("name", HEADS)
def test_every_output_asked_for(name):
    config = small_config(use_weighted_layer_sum=True)
    with torch.no_grad():
        forward(fast_model(name, config), masked=True, output_hidden_states=True)
        forward(fast_model(name, config), masked=True, output_attentions=True)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "with gradients"])
@pytest.mark.parametrize("form", ["base", "large"])
@pytest.mark.parametrize("name", MODELS)
def test_utterances_of_any_lengths(name, form, gradients, monkeypatch):
    """Lengths are known on the host. What is uploaded of them is pinned, which a device that is not there cannot do."""

    def upload(values, device):
        return torch.empty(values.shape, dtype=values.dtype, device=device)

    monkeypatch.setattr(_packing, "upload", upload)
    model = fast_model(name, small_config(form))
    with torch.set_grad_enabled(gradients), no_gpu_needed(TABLE) as mode, pretend("hopper"), recording():
        waveforms = [torch.empty(n, device="cuda") for n in (600, 337, 250)]
        outputs = forward_ragged(to_device(model), waveforms, output_hidden_states=True)
        assert [out[0].shape[0] for out in outputs] == [1, 1, 1]
    assert {"waveform_conv", "strided_conv", "gated_attention", "position_gate", "positional_conv"} <= mode.ran
    assert ("stats_pool" in mode.ran) == (name == "WavLMForXVector")


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_an_exact_batch_waits_for_its_lengths_unless_a_graph_is_captured(name, capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    model = accelerate(fast_model(name), padding="exact")
    with torch.no_grad(), nullcontext() if capturing else pytest.raises(Exception, match="(?i)wait|data-?dependent"):
        forward(model, masked=True)


def test_an_adapter_on_top():
    config = small_config(add_adapter=True, output_hidden_size=24)
    with torch.no_grad():
        forward(fast_model("WavLMForCTC", config), masked=True)
        forward(fast_model("WavLMModel", config), masked=True)


def test_transformers_own_mask_copies_a_number_to_the_device():
    """What the mask of our classes avoids; should transformers change it, ours may go."""
    with torch.no_grad(), pytest.raises(Waits, match="copies the number"):
        forward(plain_model("WavLMModel"), masked=True)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.tensor([1.0, 2.0], device="cuda"),
        lambda x: torch.tensor([1.0, 2.0]).to(x.device),
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), torch.ones(3, device="cuda")),
        lambda x: x.__setitem__(torch.arange(2, device="cuda"), 1.0),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.long, device="cuda"), 0),
        lambda x: [1 for _ in range(int(x.max()))],
    ],
)
def test_what_waits_is_seen(wait):
    with no_gpu_needed(), pytest.raises(Exception) as caught:  # noqa: PT011 (the mode's or the fake tensor's own)
        wait(torch.empty(4, 3, device="cuda"))
    assert isinstance(caught.value, Waits) or "DataDependent" in type(caught.value).__name__ + str(caught.value)


@pytest.mark.parametrize(
    "harmless",
    [
        lambda x: x.__setitem__(x > 0, 0.0),
        lambda x: x.masked_fill(x > 0, 1),
        lambda x: x[torch.arange(2, device="cuda")],
        lambda x: torch.where(x > 0, x, 1.0) + x.cumsum(0) / 3,
        lambda x: torch.full((3,), 2.0, device="cuda"),
    ],
)
def test_what_does_not_wait_is_let_through(harmless):
    with no_gpu_needed():
        harmless(torch.empty(4, 3, device="cuda"))


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    device = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.int32, torch.float32])
@pytest.mark.parametrize("lengths", [(600, 600), (599, 20), (300, 1), (15, 0), (11, 10), (29, 30)])
def test_the_mask_is_transformers_own(lengths, dtype, monkeypatch):
    ours, theirs = fast_model("WavLMModel"), plain_model("WavLMModel")
    mask = ragged_mask(*lengths).to(dtype)
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *args, device: arange(*args))
    found = ours._get_feature_vector_attention_mask(29, mask.as_subclass(Elsewhere))
    monkeypatch.undo()
    expected = theirs._get_feature_vector_attention_mask(29, mask)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("inference", [False, True])
def test_a_padding_mask_of_microsofts_is_looked_at_once(inference, monkeypatch):
    """Whether it ends every row cannot be known without: its layers get it one after the other. What it uploads for the
    position bias, as theirs does, is not ours to change.
    """

    def bias(self, frames):
        return torch.empty(self.num_heads, 2 * frames - 1, device="cuda")

    looks = []
    monkeypatch.setattr(Attention, "compute_rel_bias", bias)
    monkeypatch.setattr(_masks, "is_prefix", lambda valid: looks.append(valid) is None)
    model = fast(original("base"))
    with torch.inference_mode(inference), no_gpu_needed(TABLE) as mode, pretend("hopper"), recording():
        model = to_device(model)
        padding = torch.zeros(2, 600, dtype=torch.bool, device="cuda")
        model.extract_features(torch.empty(2, 600, device="cuda"), padding)
    assert len(model.encoder.layers) > 1 and len(looks) == 1
    assert "gated_attention" in mode.ran
