"""Seeded weights under which every part of WavLM matters to the output.

transformers' own initialisation leaves the relative position bias near zero, the gates near one value and the attention
nearly uniform: with such weights a missing gate or a shifted bucket changes nothing that a tolerance would catch. These
weights make each of them visible, and put a few channels at the magnitude that published checkpoints show.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import WavLMConfig

OUTLIER = 50.0  # magnitude of the few large channels of the residual stream
_READ = 3.0  # what such a channel contributes to a projection that reads it, in ordinary channels
_BRANCH_POST, _BRANCH_STABLE = 0.5, 0.25  # rms of what attention and feed-forward add to the stream
_POST_GROWTH = 1.09  # how much a branch widens the ordinary channels before the next norm, measured
_GATE_LOGIT = 2.0  # std of the logits of the two gates: sigmoids from about 0.02 to 0.98
_QUERY_KEY = math.sqrt(3.0)  # std of q and of k: with the gated bias, rows with a handful of heavy keys
_GELU_GAIN = math.sqrt(2.0)  # keeps the rms through conv + activation

# Projections that read the residual stream, outliers included.
_READERS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "intermediate_dense",
    "projector",
    "lm_head",
    "classifier",
    "adapter.proj",
)


def make_sensitive(model: nn.Module, seed: int = 0) -> nn.Module:
    """Overwrite every parameter of a WavLM model in place and return the model.

    The relative bias is of order 1, the gates spread over their range, attention rows are peaked, and a few channels of
    the residual stream carry values of about +-50; activations stay finite in fp32, bf16 and fp16.

    Args:
        model: any of transformers' WavLM classes or ours, either norm form, any dtype or device, with its ``config``.
        seed: the weights depend on this, on the configuration and on the parameters' names within the base model, not
            on torch's global generator (which is left alone) nor on the class: the base model inside all six classes
            gets the same weights.

    Raises:
        TypeError: if the model has no WavLM configuration.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "wavlm":
        raise TypeError(f"make_sensitive wants a WavLM model with its config, got {type(model).__name__}")
    plan = _Plan.of(config, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = plan.value(canonical_name(name), tuple(parameter.shape))
            parameter.copy_(value.to(parameter.dtype))
        _normalise_gain(model)
    return model


def canonical_name(name: str) -> str:
    """The parameter's name within the base model, whichever class holds it and however weight norm is spelled."""
    name = re.sub(r"^(.*\.)?wavlm\.", "", name)
    name = name.replace("parametrizations.weight.original0", "weight_g")
    return name.replace("parametrizations.weight.original1", "weight_v")


@dataclass(frozen=True)
class _Plan:
    """What the values depend on: the seed, the sizes, the norm form and which channels are the large ones."""

    seed: int
    hidden: int
    heads: int
    layers: int
    stable: bool
    outliers: tuple[int, ...]
    signs: tuple[float, ...]

    @classmethod
    def of(cls, config: WavLMConfig, seed: int) -> _Plan:
        hidden = config.hidden_size
        count = 4 if hidden >= 256 else 2  # even, with alternating signs: the mean over channels stays near 0
        order = torch.randperm(hidden, generator=_generator(seed, "outliers"))[:count]
        signs = tuple(1.0 if i % 2 == 0 else -1.0 for i in range(count))
        return cls(
            seed,
            hidden,
            config.num_attention_heads,
            config.num_hidden_layers,
            bool(config.do_stable_layer_norm),
            tuple(order.tolist()),
            signs,
        )

    def value(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The new value of one parameter, fp32 on the CPU."""
        noise = torch.randn(shape, generator=_generator(self.seed, name))
        for pattern, rule in _RULES:
            if re.search(pattern, name):
                return rule(self, name, noise)
        return _other(self, name, noise)

    def spread(self, layer: int) -> float:
        """rms of an ordinary channel of the residual stream before layer number ``layer``."""
        return math.sqrt(1.0 + 2.0 * _BRANCH_STABLE**2 * layer) if self.stable else 1.0

    def stream_rms(self, layer: int) -> float:
        """rms over all channels of the residual stream, outliers included: what a layer norm divides by."""
        large = len(self.outliers)
        ordinary = (self.hidden - large) * self.spread(layer) ** 2
        return math.sqrt((large * OUTLIER**2 + ordinary) / self.hidden)

    def read(self, noise: torch.Tensor, target: float) -> torch.Tensor:
        """[C', C, ...] weights on the stream, giving outputs of rms ``target``; large channels enter reduced."""
        large = len(self.outliers)
        fan_in = self.hidden - large + large * _READ**2
        fan_in *= noise[0, 0].numel()
        noise[:, list(self.outliers)] *= _READ / OUTLIER
        return noise * (target / math.sqrt(fan_in))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _fan_in(noise: torch.Tensor, target: float) -> torch.Tensor:
    return noise * (target / math.sqrt(max(1, noise[0].numel())))


def _relative_bias(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    return noise  # [buckets, H]


def _gate_weight(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    head_dim = noise.shape[1]  # [8, D]; four rows are summed into one logit
    noise[:, [c % head_dim for c in plan.outliers]] *= _READ / OUTLIER
    return noise * (_GATE_LOGIT / math.sqrt(4 * head_dim))


def _gate_bias(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    return noise * 0.25


def _gate_const(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    return 0.5 + 2.5 * torch.special.ndtr(noise)  # [1, H, 1, 1], uniform: every head has its own


def _query_key(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    return plan.read(noise, _QUERY_KEY)


def _branch_out(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    return _fan_in(noise, _BRANCH_STABLE if plan.stable else _BRANCH_POST)


def _feed_forward_out(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    return _branch_out(plan, name, noise) * _GELU_GAIN


def _stream_norm(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    """Layer norms on the stream undo the division by the outlier-heavy rms: ordinary channels stay of order 1."""
    found = re.search(r"layers\.(\d+)\.", name)
    layer = int(found.group(1)) if found else (plan.layers if plan.stable else 0)
    rms = plan.stream_rms(layer)
    grown = plan.spread(layer) if plan.stable else _POST_GROWTH
    gain = (rms / grown) * (1.0 + 0.1 * noise.clamp(-3, 3))
    gain[list(plan.outliers)] = rms * (1.0 + 0.02 * noise[list(plan.outliers)].clamp(-3, 3))
    return gain


def _stream_start(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    value = _fan_in(noise, 1.0)
    value[list(plan.outliers)] *= 0.1 * OUTLIER
    return value


def _stream_start_bias(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    value = 0.1 * noise
    value[list(plan.outliers)] = OUTLIER * torch.tensor(plan.signs)
    return value


def _positional_weight(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    """[C, C/groups, K]: input channel j of output channel o is channel j of o's group."""
    channels, per_group, kernel = noise.shape
    first = torch.arange(channels) // per_group * per_group
    read = first[:, None] + torch.arange(per_group)
    large = torch.isin(read, torch.tensor(plan.outliers))
    noise = torch.where(large[..., None], noise * (_READ / OUTLIER), noise)
    return noise * (0.5 / math.sqrt(per_group * kernel))


def _positional_gain(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    return 1.0 + 0.3 * noise.clamp(-2, 2)  # in norms of weight_v, multiplied in by _normalise_gain


def _reader(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    return plan.read(noise, 1.0) if noise.shape[1] == plan.hidden else _fan_in(noise, 1.0)


def _convolution(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    return _fan_in(noise, _GELU_GAIN)


def _vector(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    return noise


def _other(plan: _Plan, name: str, noise: torch.Tensor) -> torch.Tensor:
    """Norm gains around one, biases of 0.1, matrices that keep the rms."""
    if name.endswith("bias"):
        return 0.1 * noise
    if noise.dim() < 2:
        return 1.0 + 0.1 * noise.clamp(-3, 3)
    return _fan_in(noise, 1.0)


_Rule = Callable[[_Plan, str, torch.Tensor], torch.Tensor]
_RULES: tuple[tuple[str, _Rule], ...] = (
    (r"rel_attn_embed\.weight$", _relative_bias),
    (r"gru_rel_pos_linear\.weight$", _gate_weight),
    (r"gru_rel_pos_linear\.bias$", _gate_bias),
    (r"gru_rel_pos_const$", _gate_const),
    (r"attention\.[qk]_proj\.weight$", _query_key),
    (r"attention\.out_proj\.weight$", _branch_out),
    (r"output_dense\.weight$", _feed_forward_out),
    (r"encoder\.(layers\.\d+\.(final_)?)?layer_norm\.weight$", _stream_norm),
    (r"feature_projection\.projection\.weight$", _stream_start),
    (r"feature_projection\.projection\.bias$", _stream_start_bias),
    (r"pos_conv_embed\.conv\.weight(_v)?$", _positional_weight),
    (r"pos_conv_embed\.conv\.weight_g$", _positional_gain),
    (r"conv_layers\.\d+\.conv\.weight$", _convolution),
    (r"tdnn\.\d+\.kernel\.weight$", _convolution),
    (r"(masked_spec_embed|layer_weights)$", _vector),
    (r"(^|\.)(" + "|".join(re.escape(n) for n in _READERS) + r")\.weight$", _reader),
)


def _normalise_gain(model: nn.Module) -> None:
    """Weight norm multiplies weight_v / |weight_v| by weight_g: give weight_g the scale of weight_v's own norm."""
    found = {}
    for name, parameter in model.named_parameters():
        name = canonical_name(name)
        if name.endswith(("weight_g", "weight_v")):
            found[name] = parameter
    for name, direction in found.items():
        if not name.endswith("weight_v"):
            continue
        gain = found[name[: -len("weight_v")] + "weight_g"]
        over = [d for d in range(direction.dim()) if gain.shape[d] == 1]
        gain.mul_(direction.float().norm(dim=over, keepdim=True).to(gain.dtype))
