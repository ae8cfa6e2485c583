"""The types of the public API: as mypy sees them, as they are, and that all of it is looked at strictly."""

import ast
import re
import subprocess
import sys
import types
import typing
from fnmatch import fnmatch

import pytest
import usage
from checked import FILES, ROOT, wanted
from transformers import WavLMConfig

import wavlm_fast
from wavlm_fast.models import WavLMForXVector
from wavlm_fast.original import config as microsoft

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

pytestmark = pytest.mark.xdist_group("typing")
USAGE, WRONG = FILES
CONVOLUTIONS = "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2"
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "xvector_output_dim": 16,
    "tdnn_dim": (16,) * 3, "tdnn_kernel": (1,) * 3, "tdnn_dilation": (1,) * 3,
}  # fmt: skip
ENTRIES = {
    "encoder_layers": 2, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 2,
    "conv_feature_layers": CONVOLUTIONS, "conv_pos": 16, "conv_pos_groups": 4,
    "relative_position_embedding": True, "gru_rel_pos": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def errors():
    """File -> line -> codes of mypy's errors."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--no-color-output", *map(str, FILES)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = {file: {} for file in FILES}
    for path, line, code in re.findall(r"^(.+?):(\d+): error: .*\[([a-z-]+)\]$", run.stdout, re.MULTILINE):
        if ROOT / path in found:  # the package itself is make lint's
            found[ROOT / path].setdefault(int(line), []).append(code)
    assert found[WRONG], run.stdout + run.stderr
    return found


def test_a_users_program_has_the_types_that_it_says(errors):
    assert errors[USAGE] == {}


def test_wrong_uses_are_refused_and_for_what_is_wrong(errors):
    assert errors[WRONG] == {line: [code] for line, code in wanted().items()}


def test_the_program_uses_all_that_is_public():
    nodes = ast.walk(ast.parse(USAGE.read_text()))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "wavlm_fast"}
    assert set(wavlm_fast.__all__) <= used


def holds(value, kind):
    """Whether a value is of a type, as far as that can be seen."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is typing.Any:
        return True
    if kind is None:
        return value is None
    if origin is typing.Literal:
        return value in inner
    if origin in (typing.Union, types.UnionType):
        return any(holds(value, one) for one in inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(holds, value, inner))
    if origin in (list, tuple):
        return isinstance(value, origin) and all(holds(one, inner[0]) for one in value)
    return isinstance(value, origin or kind)


def test_the_types_are_those_of_what_comes(tmp_path, monkeypatch):
    seen = []

    def assert_type(value, kind):
        assert holds(value, kind), f"{value!r:.200} is no {kind}"
        seen.append(kind)
        return value

    WavLMForXVector(WavLMConfig(**SIZES)).save_pretrained(tmp_path)
    monkeypatch.setattr(usage, "assert_type", assert_type)
    usage.everything(tmp_path, ENTRIES)
    skipped = 0 if seen.count(usage.BackendUnavailable) else 1
    assert len(seen) + skipped == USAGE.read_text().count(" assert_type(")


def test_what_holds_for_a_value_can_fail():
    assert holds([1, "a"], list[int | str])
    assert not holds([1, None], list[int | str])
    assert not holds((1, 2), tuple[int])
    assert not holds("long", typing.Literal["exact"])


def overrides(key):
    """The modules for which pyproject.toml sets something of mypy's."""
    tables = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    return [module for table in tables if key in table for module in table["module"]]


def test_what_users_import_is_looked_at_strictly():
    strict, relaxed = overrides("disallow_any_generics"), overrides("disable_error_code")
    homes = {vars(wavlm_fast)[name].__module__ for name in wavlm_fast.__all__} - {"transformers"}
    homes = {home for home in homes if home.startswith("wavlm_fast")} | {"wavlm_fast", "wavlm_fast.original.wavlm"}
    for home in homes:
        assert any(fnmatch(home, module) for module in strict), home
        assert not any(fnmatch(home, module) for module in relaxed), home
    assert not overrides("ignore_errors")


def test_microsofts_config_says_what_its_entries_are():
    hints = typing.get_type_hints(microsoft.WavLMConfig)
    assert list(hints) == list(microsoft.DEFAULTS)
    for name, value in microsoft.DEFAULTS.items():
        assert type(value) is hints[name] or (type(value), hints[name]) == (int, float), name
