"""What the extension leaves undefined: one file runs under every torch only as long as that is stable."""

import re
import shutil
import subprocess
import sys

import pytest

from wavlm_fast.backends import cpu

LIBRARY = next(iter(sorted(cpu._FOLDER.glob("_C*.so"))), None)
TOOL = {"linux": ["nm", "-D", "--undefined-only"], "darwin": ["nm", "-u"]}.get(sys.platform)
pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason=str(cpu.EXTENSION_PROBLEM)),
    pytest.mark.skipif(TOOL is None or shutil.which(TOOL[0]) is None, reason="no nm that lists undefined symbols"),
]
# Torch's C functions; those of the C and C++ libraries, which have versions; and what a linker leaves to be absent.
ELF = re.compile(r"U (aoti_)?torch_\w+|U \w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\w.]+|[wv] \w+(@\w+_[\w.]+)?")
CPP_OF_TORCH = re.compile(r"_*Z\w*N[KVO]*(2at|3c10|5torch)")
PYTHON = re.compile(r"_*Py[A-Z_]")


def undefined():
    listing = subprocess.run([*TOOL, str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    return [line.strip() for line in listing.splitlines() if line.strip()]


def test_nothing_of_libtorchs_cpp_interface_nor_of_cpython():
    names = [line.split()[-1] for line in undefined()]
    assert any("torch_library_impl" in name for name in names)  # the listing is one
    assert [name for name in names if CPP_OF_TORCH.match(name) or PYTHON.match(name)] == []


@pytest.mark.skipif(sys.platform != "linux", reason="only ELF's symbols have the versions of their library")
def test_only_torchs_c_functions_and_the_systems_libraries():
    assert [line for line in undefined() if not ELF.fullmatch(line)] == []


def test_the_patterns_know_what_they_are_for():
    """As the extension had them when it was linked against libtorch's C++ interface."""
    for name in ("_ZN2at4_ops5empty4callE", "_ZN3c106detail14torchCheckFailEPKcS2_jS2_", "_ZNK5torch7Library5_implE",
                 "_ZN3c10lsERSoRKNS_6DeviceE", "_ZTIN3c105ErrorE", "PyObject_Call", "_PyObject_New"):  # fmt: skip
        assert CPP_OF_TORCH.match(name) or PYTHON.match(name)
        assert not ELF.fullmatch(f"U {name}")
    assert ELF.fullmatch("U torch_parallel_for")
    assert ELF.fullmatch("U memcpy@GLIBC_2.14")
    assert not ELF.fullmatch("U _ZNSt15__exception_ptr13exception_ptr9_M_addrefEv")  # of libtorch's own C++ library
