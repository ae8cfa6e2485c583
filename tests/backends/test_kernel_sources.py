"""Kernels are compiled for CPUs that not everybody has: what they include must not leak such code to everybody."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
# Headers without inline functions that another file might share: types, builtins and intrinsics.
ALLOWED = {"cstddef", "cstdint", "cstring", "immintrin.h", "arm_neon.h"}


def system_headers(source):
    text = source.read_text()
    found = set(re.findall(r"#include <([^>]+)>", text))
    for name in re.findall(r'#include "([^"]+)"', text):
        found |= system_headers(CSRC / name)
    return found


@pytest.mark.parametrize("source", sorted(CSRC.glob("*_kernel.cpp")), ids=lambda path: path.name)
def test_kernels_include_no_shared_inline_code(source):
    assert system_headers(source) <= ALLOWED
    assert "namespace WAVLM_FAST_ISA" in source.read_text()
