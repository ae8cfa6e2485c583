"""What the tests of exported, traced and transformed models share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from wavlm_cases import (
    SAMPLES,
    assert_tensor_close,
    fast_like,
    main_output,
    plain_model,
    ragged_mask,
    small_config,
    truth_of,
    waveforms,
)

each_class = pytest.mark.parametrize("name", ["WavLMModel", "WavLMForCTC", "WavLMForXVector"])
both_forms = pytest.mark.parametrize("form", ["base", "large"])
# For exporters that take seconds: every class and both forms, not every pair.
a_few = pytest.mark.parametrize(
    ("name", "form"), [("WavLMModel", "base"), ("WavLMForCTC", "large"), ("WavLMForXVector", "base")]
)


class Main(torch.nn.Module):
    """The main output alone: what tools get that know nothing of transformers' output classes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_values, attention_mask=None):
        return main_output(self.model(input_values, attention_mask=attention_mask))


def pair(name, form, layers=2):
    """Transformers' model, ours with the same weights, and inputs for both, masked and not."""
    case = _pair(name, form, layers)
    for model in (case.plain, case.ours):
        model.eval()  # some exporters leave models as if in training
    return case


@cache
def _pair(name, form, layers):
    plain = plain_model(name, small_config(form, num_hidden_layers=layers))
    return SimpleNamespace(
        plain=plain,
        ours=fast_like(plain),
        x=waveforms(),
        inputs={False: (waveforms(),), True: (waveforms(), ragged_mask(SAMPLES, 400))},
    )


def check(got, plain, *inputs):
    """The main output obeys the rule that transformers' own sets."""
    doubled = [x.double() if x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        assert_tensor_close("output", got, Main(plain)(*inputs), Main(truth_of(plain))(*doubled))


def our_ops(graph):
    """The ops of ours in a graph: of torch.export or fx, or what a graph of torch.jit prints."""
    if isinstance(graph, torch.fx.Graph):
        targets = {str(node.target) for node in graph.nodes if node.op == "call_function"}
        return {t for t in targets if t.startswith("wavlm_fast")}
    return set(re.findall(r"wavlm_fast\w*::\w+", str(graph)))


def without_us(script: str, *args: object) -> None:
    """Run a script in a process that cannot import wavlm_fast."""
    blocked = "import sys\nsys.modules['wavlm_fast'] = None\nimport torch\ntorch.set_num_threads(1)\n"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", blocked + script, *map(str, args)],
        check=True,
        cwd=Path(__file__).parent,
        env=environment,
    )
