"""CUDA graphs on the CPU: a capture records the ops that run, with their tensors; a replay runs them on these again."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FakeGraph:
    """Stands in for torch.cuda.CUDAGraph. Like one, it knows memory, not Python."""

    def __init__(self) -> None:
        self.ops: list[tuple] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.ops:
            again = func(*args, **kwargs)
            given = {t.untyped_storage()._cdata for t in _dense(args)}
            for old, new in zip(_dense(out), _dense(again), strict=True):
                if old.untyped_storage()._cdata not in given:  # neither a view nor written in place
                    old.copy_(new)


def _dense(values: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor) and t.layout is torch.strided]


class FakeCapture(TorchDispatchMode):
    """Stands in for torch.cuda.graph."""

    def __init__(self, graph: FakeGraph, pool: Any, stream: Any, capture_error_mode: str) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name != "aten::_local_scalar_dense":
            self.graph.ops.append((func, args, kwargs or {}, out))
        return out


class FakeStream:
    """Stands in for streams and events."""

    def __init__(self, *args: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    wait_event = record = wait_stream


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let graphs be captured of models on the CPU."""
    monkeypatch.setattr(importlib.import_module("wavlm_fast.graphed"), "_DEVICE_TYPE", "cpu")
    values = {
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "current_stream": FakeStream,
        "graph_pool_handle": object,
        "device": lambda device: nullcontext(),
        "stream": lambda stream: nullcontext(),
        "Stream": FakeStream,
        "Event": FakeStream,
        "CUDAGraph": FakeGraph,
        "graph": FakeCapture,
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, value)
