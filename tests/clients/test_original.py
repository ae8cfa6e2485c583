"""Our class with Microsoft's constructor against Microsoft's, and weights that go from house to house."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from held_to_truth import DTYPES, Three, heard, in_float64
from houses import FORMS, LAYERS, MICROSOFT, config, microsoft_config, microsoft_model, torchaudio_model
from wavlm_cases import assert_close_to_truth, assert_same, plain_model, ragged_mask

import wavlm_fast
from wavlm_fast import conversion, original

every_form = pytest.mark.parametrize("form", FORMS)
PADDED = ragged_mask(600, 400) == 0


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("form", ["base", "large"])
def test_one_import_is_all_that_changes(form, dtype, accelerated):
    theirs, exact = microsoft_model(form).to(dtype), in_float64(microsoft_model(form).to(dtype))
    ours = original.WavLM(original.WavLMConfig(microsoft_config(form)))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    ours = ours.eval().to(dtype)
    models = Three(theirs, wavlm_fast.accelerate(ours) if accelerated else ours, exact)
    either = (False, True)
    for mask, layer, results, conv in itertools.product((None, PADDED), (None, 1, LAYERS), either, either):
        arguments = {"padding_mask": mask, "output_layer": layer, "ret_layer_results": results, "ret_conv": conv}
        with torch.no_grad():
            expected, got, truth = (m.extract_features(heard(m), **arguments) for m in models)
        assert_close_to_truth(got, expected, truth)


def test_configurations_are_spelt_alike():
    assert vars(original.WavLMConfig()) == vars(MICROSOFT.WavLMConfig())
    changed = microsoft_config("large")
    assert vars(original.WavLMConfig(changed)) == vars(MICROSOFT.WavLMConfig(changed))


@pytest.mark.parametrize("kind", ["static", "uniform", "normal", "poisson"])
@pytest.mark.parametrize("mask", [None, torch.arange(97) >= torch.tensor([[97], [60], [31]])], ids=["", "padded"])
def test_masks_are_drawn_alike(kind, mask):
    for seed in range(5):
        found = []
        for house in (MICROSOFT, original):
            np.random.seed(seed)
            arguments = {"mask_type": kind, "mask_other": 2.0, "min_masks": 2, "min_space": 1}
            drawn = house.compute_mask_indices((3, 97), mask, 0.4, 7, **arguments)
            found.append((drawn, np.random.rand()))
        assert np.array_equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@every_form
def test_weights_go_from_house_to_house(form):
    whole = plain_model("WavLMModel", config(form, mask_time_prob=0.1))
    microsoft, torchaudios = microsoft_model(form), torchaudio_model(form)
    there = conversion.to_microsoft(whole.config, whole.state_dict(), normalise=form == "large")
    assert_same(dict(there.state), dict(microsoft.state_dict()))
    MICROSOFT.WavLM(MICROSOFT.WavLMConfig(there.config)).load_state_dict(there.state)
    back = conversion.from_microsoft(microsoft_config(form), microsoft.state_dict())
    assert_same(dict(back.state), {n: v for n, v in whole.state_dict().items() if n in back.state})
    there = conversion.to_torchaudio(whole.config, whole.state_dict())
    assert_same(dict(there.state), dict(torchaudios.state_dict()))
    back = conversion.from_torchaudio(there.config, there.state)
    assert_same(dict(back.state), {n: v for n, v in whole.state_dict().items() if n != "masked_spec_embed"})
