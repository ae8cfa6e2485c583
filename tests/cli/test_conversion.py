"""Names and configurations between the three houses, as dicts."""

import pytest
import torch
from tiny_checkpoints import tiny_config
from transformers import WavLMModel

from wavlm_fast import conversion
from wavlm_fast.errors import UserError
from wavlm_fast.sensitive import make_sensitive

FORMS = {
    "post-norm": {},
    "pre-norm": {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True},
    "mixed": {"do_stable_layer_norm": True, "hidden_act": "relu", "mask_time_prob": 0.0},
}


@pytest.fixture(params=FORMS)
def model(request):
    return make_sensitive(WavLMModel(tiny_config(**FORMS[request.param]))).eval()


def changed(before, after):
    """The entries of a configuration that are not what they were."""
    before, after = before.to_dict(), after.to_dict()
    return {key for key in before if before[key] != after.get(key)}


def same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in state.items())


@pytest.fixture
def base():
    model = WavLMModel(tiny_config())
    return model.config, model.state_dict()


def refused(call, *arguments):
    with pytest.raises(UserError) as raised:
        call(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_to_microsoft_and_back(model):
    there = conversion.to_microsoft(model.config, model.state_dict(), True)
    back = conversion.from_microsoft(there.config, there.state)
    same(model.state_dict(), back.state)
    assert there.config["normalize"] is True
    assert changed(model.config, back.config) == {"apply_spec_augment"}


def test_to_torchaudio_and_back():
    model = make_sensitive(WavLMModel(tiny_config(**FORMS["pre-norm"])))
    there = conversion.to_torchaudio(model.config, model.state_dict())
    back = conversion.from_torchaudio(there.config, there.state)
    same({key: value for key, value in model.state_dict().items() if key != "masked_spec_embed"}, back.state)
    assert changed(model.config, back.config) == {"apply_spec_augment", "mask_time_prob"}
    assert there.said == ["masked_spec_embed stays behind: torchaudio's class does not mask"]


@pytest.mark.parametrize("form", ["post-norm", "pre-norm"])
def test_the_weights_alone_say_what_torchaudio_was_built_with(form):
    model = WavLMModel(tiny_config(**FORMS[form]))
    there = conversion.to_torchaudio(model.config, model.state_dict())
    arguments, said = conversion.torchaudio_arguments(there.state)
    assert {key for key, value in there.config.items() if arguments[key] != value} <= {
        "encoder_projection_dropout",
        "encoder_ff_interm_dropout",
    }
    assert "encoder_max_distance=800" in said[0]


def test_both_spellings_of_weight_norm(base):
    config, state = base
    old = {
        key.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for key, value in state.items()
    }
    assert old.keys() != state.keys()
    there = conversion.to_torchaudio(config, old)
    same(there.state, conversion.to_torchaudio(config, state).state)
    spelt = {key.replace("parametrizations.weight.original0", "weight_g"): value for key, value in there.state.items()}
    same(
        conversion.from_torchaudio(there.config, spelt).state,
        conversion.from_torchaudio(there.config, there.state).state,
    )


def test_a_weight_that_is_missing_too_much_or_of_another_shape(base):
    config, state = base
    last = "encoder.layers.1.final_layer_norm.bias"
    without = {key: value for key, value in state.items() if key != last}
    assert refused(conversion.to_microsoft, config, without, False) == f"{last} is missing from the weights"
    assert refused(conversion.to_torchaudio, config, without) == f"{last} is missing from the weights"
    more = {**state, "lm_head.bias": torch.ones(3)}
    assert refused(conversion.to_torchaudio, config, more) == "lm_head.bias among the weights is none of WavLM's"
    other = {**state, last: torch.ones(31)}
    assert refused(conversion.to_microsoft, config, other, False) == f"{last} of shape [32] is wanted, got [31]"
    whole = {**state, last: torch.ones(32, dtype=torch.int64)}
    assert refused(conversion.to_microsoft, config, whole, False) == (
        f"floating-point weights are wanted, but {last} is torch.int64"
    )


def test_no_weight_is_forgotten_by_the_map(base, monkeypatch):
    """A line that is lost from the map is found out in whatever direction it is used."""
    config, state = base
    microsoft, torchaudio = conversion.to_microsoft(config, state, False), conversion.to_torchaudio(config, state)
    every = conversion.names
    for lost in every(config):
        monkeypatch.setattr(conversion, "names", lambda config, lost=lost: (n for n in every(config) if n != lost))
        for call, arguments in (
            (conversion.to_microsoft, (config, state, False)),
            (conversion.from_microsoft, microsoft[:2]),
            (conversion.to_torchaudio, (config, state)),
        ):
            assert "is none of WavLM's" in refused(call, *arguments)
        if lost.third is None:
            assert "is none of WavLM's" in refused(conversion.from_torchaudio, *torchaudio[:2])


def test_what_changes_outputs_and_has_no_counterpart_is_refused():
    for options, said in (
        ({"layer_norm_eps": 1e-6}, "has layer norms of epsilon 1e-05, but this model's have 1e-06"),
        ({"feat_extract_activation": "relu"}, "has gelu after convolutions, but this model has 'relu'"),
        ({"add_adapter": True}, "has no adapter on top of the encoder"),
    ):
        config = tiny_config(**options)
        assert said in refused(conversion.to_microsoft, config, {}, False)
        assert said in refused(conversion.to_torchaudio, config, {})
    assert refused(conversion.to_torchaudio, tiny_config(hidden_act="relu"), {}) == (
        "torchaudio's feed-forward layers have gelu only, but this model has 'relu'"
    )
    assert "got 'selu'" in refused(conversion.to_microsoft, tiny_config(hidden_act="selu"), {}, False)


def test_where_microsofts_class_does_not_project():
    config = tiny_config(hidden_size=16)
    model = make_sensitive(WavLMModel(config))
    assert "but this model has one that is not the identity" in refused(
        conversion.to_microsoft, config, model.state_dict(), False
    )
    with torch.no_grad():
        model.feature_projection.projection.weight.copy_(torch.eye(16))
        model.feature_projection.projection.bias.zero_()
    there = conversion.to_microsoft(config, model.state_dict(), False)
    assert not any(key.startswith("post_extract_proj") for key in there.state)
    same(model.state_dict(), conversion.from_microsoft(there.config, there.state).state)


def test_a_cfg_that_is_none_of_a_wavlm(base):
    cfg, state, _ = conversion.to_microsoft(*base, False)
    for change, said in (
        ({"gru_rel_pos": False}, "a cfg of a WavLM has gru_rel_pos true, got False: it is of another model"),
        ({"encoder_layers": "12"}, "encoder_layers of a cfg is int, got '12'"),
        ({"activation_fn": "glu"}, "transformers has no feed-forward layer with the activation_fn 'glu'"),
        ({"dropout": 1.5}, "a probability is wanted for what transformers calls hidden_dropout, got 1.5"),
        ({"mask_prob": float("nan")}, "a probability is wanted for what transformers calls mask_time_prob, got nan"),
        ({"extractor_mode": "group"}, "an extractor_mode of default or layer_norm is wanted, got 'group'"),
        (
            {"encoder_layers": 10**9},
            f"weights of 1000000000 layers are wanted, as cfg says, but there are {len(state)} weights",
        ),
        ({"encoder_attention_heads": 0}, "a number of heads that divides the 32 channels is wanted, got 0"),
        ({"encoder_attention_heads": 3}, "a number of heads that divides the 32 channels is wanted, got 3"),
    ):
        assert refused(conversion.from_microsoft, {**cfg, **change}, state) == said
    for change in ({"max_distance": 80}, {"max_distance": 0}, {"num_buckets": 3}):
        assert "are wanted for the position bias, got" in refused(conversion.from_microsoft, {**cfg, **change}, state)


def test_what_a_cfg_leaves_out_is_as_microsofts_class_has_it(base):
    cfg, state, _ = conversion.to_microsoft(*base, False)
    del cfg["max_distance"], cfg["encoder_layerdrop"]
    config = conversion.from_microsoft(cfg, state).config
    assert (config.max_bucket_distance, config.layerdrop) == (1280, 0.0)


def test_what_stays_behind_is_said(base):
    cfg, state, _ = conversion.to_microsoft(*base, False)
    there = conversion.from_microsoft({**cfg, "feature_grad_mult": 0.1, "mask_prob": 0.0}, state)
    assert "feature_grad_mult=0.1 stays behind: it is of training, and transformers lacks it" in there.said
    assert any(said.startswith("mask_emb stays behind") for said in there.said)
    assert "masked_spec_embed" not in there.state
    back = conversion.to_microsoft(there.config, there.state, False)
    assert any(said.startswith("mask_emb is zeros") for said in back.said)
    assert not back.state["mask_emb"].any()


def test_what_torchaudios_weights_do_not_say_is_said(base):
    config, state = base
    assert len(conversion.to_torchaudio(config, state).said) == 1
    config.max_bucket_distance = 1280
    config.do_stable_layer_norm = True
    said = conversion.to_torchaudio(config, state).said[-1]
    assert said.startswith("the weights do not say encoder_max_distance=1280, encoder_layer_norm_first=True: ")


def test_entries_that_nobody_reads_are_said(base):
    cfg, state, _ = conversion.to_microsoft(*base, False)
    said = conversion.from_microsoft({**cfg, "dropout_features": 0.1, "label_rate": 50}, state).said
    assert "dropout_features=0.1 stays behind: it is of training, and transformers lacks it" in said
    assert "label_rate of the cfg stays behind: Microsoft's class does not read it" in said


def test_convolutions_that_are_no_list(base):
    cfg, state, _ = conversion.to_microsoft(*base, False)
    said = refused(conversion.from_microsoft, {**cfg, "conv_feature_layers": "exit()"}, state)
    assert said.startswith("conv_feature_layers is a list of (channels, kernel, stride) such as ")
