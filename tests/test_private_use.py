"""No file but wavlm_fast/_private.py uses what is private to torch or transformers."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.wavlm import modeling_wavlm

from wavlm_fast import _private

ROOT = Path(__file__).parent.parent
SOURCES = sorted({*ROOT.glob("wavlm_fast/**/*.py"), *ROOT.glob("kernels/*.py")} - {Path(_private.__file__)})

DOCUMENTED = {
    "torch", "torch.nn.functional", "torch.utils",
    "transformers", "transformers.modeling_outputs",
    "transformers.models.wavlm",  # its modeling_wavlm is what the library stands in for
}  # fmt: skip
# Ops of aten go by documented names, unless these begin with "_".
OPS = {"wavlm_fast", "wavlm_fast_cpu", "aten", "load_library"}
# Methods that torch and transformers call and that fast classes override: `super()` of them is what they would call.
OVERRIDDEN = {
    "_apply", "_get_name", "_load_from_state_dict",
    "_get_feature_vector_attention_mask", "_mask_hidden_states",
}  # fmt: skip


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


@cache
def foreign():
    """Private attributes of torch's and transformers' modules, classes and tensors."""
    hf = [c for c in vars(modeling_wavlm).values() if isinstance(c, type)]
    things = (torch, torch.Tensor, nn.Parameter, nn.Module, nn.Module(), modeling_wavlm, *hf)
    return {name for thing in things for name in (*dir(thing), *vars(thing)) if is_private(name)}


def defined_by(tree):
    """Private names of a file: those of its classes and objects, and the methods among them."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    members = [member for cls in classes for member in cls.body]
    methods = {m.name for m in members if isinstance(m, ast.FunctionDef)}
    fields = {m.target.id for m in members if isinstance(m, ast.AnnAssign)}
    stored = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    return {name for name in methods | fields | stored if is_private(name)}


@cache
def own():
    """Private attributes that our classes define."""
    found = set().union(*(defined_by(ast.parse(path.read_text())) for path in SOURCES))
    return found - foreign()


def is_inside(module):
    return module.split(".")[0] in ("torch", "transformers")


def other_modules(tree):
    """Names under which a file knows modules of this package and of others."""
    nodes = list(ast.walk(tree))
    relative = [a for n in nodes if isinstance(n, ast.ImportFrom) and n.level for a in n.names]
    absolute = [a for n in nodes if isinstance(n, ast.Import) for a in n.names if not is_inside(a.name)]
    return {alias.asname or alias.name for alias in (*relative, *absolute)}


def is_super(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def uses(source):
    """What is private to torch or transformers in a file, as "line: expression"."""
    tree = ast.parse(source)
    modules = other_modules(tree)
    for node in ast.walk(tree):
        private = False
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            ours = node.attr in own() or (isinstance(node.value, ast.Name) and node.value.id in modules)
            private = not ours and not (node.attr in OVERRIDDEN and is_super(node.value))
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.ops":
            private = node.attr not in OPS
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = any(is_private(a.name) for a in node.names)
            private = is_inside(node.module) and (names or node.module not in DOCUMENTED)
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if is_inside(a.name)]
            private = not DOCUMENTED.issuperset(names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            private = is_private(node.value) and node.value in foreign()
        if private:
            yield f"{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_uses_nothing_private(path):
    assert list(uses(path.read_text())) == [], f"{path}: fetch it in wavlm_fast/_private.py"


def test_no_method_overrides_a_private_one_by_chance():
    found = set().union(*(defined_by(ast.parse(path.read_text())) for path in SOURCES))
    assert found & foreign() == OVERRIDDEN


@pytest.mark.parametrize(
    "source",
    [
        "tensor._version",
        "torch._C._dispatch_keys(x)",
        "torch.nn.modules.module._global_forward_hooks",
        "self._requires_grad",
        "self._apply(f)",
        "super()._init_weights(module)",
        "getattr(module, '_forward_hooks')",
        "torch.ops.mkldnn.linear",
        "torch.ops.aten._unsafe_view(x, x.shape)",
        "def f(op: torch._ops.OpOverload): pass",
        "from torch._subclasses.fake_tensor import FakeTensor",
        "from torch.utils.weak import WeakTensorKeyDictionary",
        "from torch import _C",
        "from transformers.activations import GELUActivation",
        "import transformers.utils.output_capturing",
        "def f():\n    import torch._dynamo",
    ],
)
def test_what_is_private_is_found(source):
    assert len(list(uses(source))) >= 1


@pytest.mark.parametrize(
    "source",
    ["import torch.nn.functional as F", "super()._apply(fn)", "x.__class__", "torch.ops.aten.gelu_backward(g, x)",
     "from . import _private\n_private._anything", "self._clone", "import os\nos._exit(0)"],
)  # fmt: skip
def test_what_is_not_private_is_let_through(source):
    assert list(uses(source)) == []
