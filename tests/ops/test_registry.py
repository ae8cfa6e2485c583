"""What is known of every op beside its contract: complete, a valid call, and as dear as torch counts."""

import inspect

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import WavLMConfig

from wavlm_fast import ops
from wavlm_fast.ops import OPS, Sizes
from wavlm_fast.ops._define import arguments_of

TINY = Sizes(
    batch=2, samples=900, convs=((24, 10, 5), (32, 3, 2), (16, 2, 2)), norm="layer", conv_bias=True, channels=32,
    heads=4, inner=48, layers=3, norm_first=True, taps=6, groups=4, tdnn=((16, 5, 1), (24, 3, 2)),
)  # fmt: skip


def places(sizes=TINY):
    return [(op, place) for op in OPS.values() for place in op.places(sizes)]


def name_of(value):
    return value.name if isinstance(value, ops.Op) else value.what


every_place = pytest.mark.parametrize(("op", "place"), places(), ids=name_of)


def test_every_op_is_described():
    forwards = {name for name in ops.schemas if not name.endswith("_backward")}
    assert set(OPS) == forwards == set(ops.references)
    for name, op in OPS.items():
        assert op.name == name
        assert op.function is getattr(ops, name)
        assert list(op.places(TINY))
        assert set(op.parts) < forwards


@pytest.mark.parametrize("name", OPS)
def test_an_example_names_every_argument_of_a_dense_batch(name):
    op = OPS[name]
    packed = {"offsets", "out_offsets", "out_frames"}
    for place in op.places(TINY):
        assert list(op.at(place)) == [argument for argument in op.arguments if argument not in packed]
    # The public function takes them by the same names; a seed it draws itself.
    public = inspect.signature(op.function).parameters
    assert set(public) == set(op.arguments) - {"seed"}
    assert op.is_packable == ("offsets" in public)
    assert op.is_resizing == ("out_offsets" in public)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_place
def test_an_example_is_a_valid_call(op, place, dtype):
    """The fake kernel checks shapes and dtypes; the public function and the schema are given the same."""
    arguments = ops.empty(op.at(place), dtype, "meta")
    direct = getattr(torch.ops.wavlm_fast, op.name)(*op.for_schema(arguments))
    called = op.run(**arguments)
    direct, called = (found if isinstance(found, tuple) else (found,) for found in (direct, called))
    assert [x.shape for x in called] == [x.shape for x in direct[: len(called)]]
    assert len(called) <= len(op.outputs) <= len(direct)


@pytest.mark.parametrize("name", ["gated_attention", "encoder_layer", "stats_pool"])
def test_lengths_are_part_of_an_example(name):
    op = OPS[name]
    arguments = ops.empty(op.at(op.places(TINY)[0], lengths=True), torch.float32, "meta")
    getattr(torch.ops.wavlm_fast, name)(*op.for_schema(arguments))
    lengths = arguments["lengths" if name == "stats_pool" else "key_lengths"]
    assert (lengths.shape, lengths.dtype) == ((2,), torch.int64)


def counted(op, arguments):
    """Operations of the op's reference, by torch's count."""
    with FlopCounterMode(display=False) as counter:
        ops.references[op.name](*(value for name, value in arguments.items() if name != "keep_sum"))
    return counter.get_total_flops()


def saved(op, arguments):
    """Operations that the reference does not need, or needs on top (below zero), and why."""
    if op.name in ("position_gate", "encoder_layer"):
        # The sum over four commutes with the projection: two vectors per head are left of eight.
        gate = arguments["gate"][0] if op.name == "encoder_layer" else arguments["weight"]
        heads = arguments["gate"][2] if op.name == "encoder_layer" else arguments["const"]
        rows = arguments["x"].shape[0] * arguments["x"].shape[1] * heads.shape[0]
        return 2 * rows * (8 - 2) * gate.shape[1]
    if op.name == "positional_conv" and arguments["weight"].shape[2] % 2 == 0:
        # Padded on both sides, an even kernel gives one frame more, which is cut off.
        return -2 * arguments["x"].shape[0] * arguments["weight"].numel()
    return 0


@every_place
def test_operations_are_what_torch_counts(op, place):
    arguments = op.at(place)
    tensors = ops.empty(arguments, torch.float32, "meta")
    assert op.flops(**arguments) == op.flops(**tensors) == counted(op, tensors) + saved(op, tensors)


def test_sizes_are_those_of_a_config():
    assert Sizes() == Sizes.of(WavLMConfig(), 1, 16_000)
    other = {
        "conv_dim": (8, 9), "conv_kernel": (10, 3), "conv_stride": (5, 2), "feat_extract_norm": "layer",
        "conv_bias": True, "feat_extract_activation": "relu", "hidden_size": 36, "num_attention_heads": 3,
        "intermediate_size": 20, "hidden_act": "gelu_new", "num_hidden_layers": 2, "do_stable_layer_norm": True,
        "num_conv_pos_embeddings": 7, "num_conv_pos_embedding_groups": 2, "tdnn_dim": (5, 6), "tdnn_kernel": (3, 1),
        "tdnn_dilation": (2, 1),
    }  # fmt: skip
    found = Sizes.of(WavLMConfig(**other), 3, 400)
    assert found == Sizes(
        batch=3, samples=400, convs=((8, 10, 5), (9, 3, 2)), norm="layer", conv_bias=True, conv_activation="relu",
        channels=36, heads=3, inner=20, activation="gelu_new", layers=2, norm_first=True, taps=7, groups=2,
        tdnn=((5, 3, 2), (6, 1, 1)),
    )  # fmt: skip
    assert (found.frames_of_convs, found.frames, found.width) == ([79, 39], 39, 12)


def test_the_largest_example_is_that_of_the_most_operations():
    largest = OPS["linear_act"].largest(Sizes())
    assert (largest["weight"].shape, largest["activation"]) == ((3072, 768), "gelu")
    assert OPS["strided_conv"].largest(Sizes())["x"].shape == (1, 3199, 512)


def test_a_call_by_position_is_one_by_name():
    """`save` stands before the arguments of packed frames, and is not the caller's."""
    assert "save" in arguments_of(ops.schemas["strided_conv"])
    op = OPS["strided_conv"]
    given = {name: object() for name in op.arguments}
    by_position = dict(zip(arguments_of(ops.schemas["strided_conv"]), op.for_schema(given, save=True)))
    assert by_position == {**given, "save": True}
    assert op.for_schema({}) == (*[None] * 8, False, *[None] * 3)
