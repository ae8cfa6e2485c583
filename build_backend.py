"""The build backend: setuptools' own, which also asks for torch where its headers are needed and nowhere to be found.

The C++ kernels are built against torch's stable interface: they run on every torch since TORCH_FLOOR, whichever of
these lends its headers. The one that is installed already does; build isolation only hides it from imports. So nobody
who has torch downloads it once more, and nobody who has none gets a wheel without kernels.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import tempfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

TORCH_FLOOR = (2, 10)  # as in pyproject.toml: the first with all of the stable interface that csrc/ uses
# The probe is what csrc/vec.h and csrc/dispatch.cpp ask of the compiler, so that a level is dropped, not fatal.
PROBE = """
typedef float floats __attribute__((vector_size(64)));
typedef unsigned words __attribute__((vector_size(64)));
words probe(floats x) { return __builtin_convertvector(x, words); }
#if defined(__AVX512BF16__)
bool cpu() { return __builtin_cpu_supports("avx512bf16"); }
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#include <sys/auxv.h>
float32x4_t cpu(float32x4_t x, bfloat16x8_t y) { return getauxval(AT_HWCAP2) & 1 << 14 ? vbfdotq_f32(x, y, y) : x; }
#endif
"""


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """What a wheel needs to be built here."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *torch_to_ask_for()]


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """What an editable installation needs to be built here."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *torch_to_ask_for()]


def torch_to_ask_for() -> list[str]:
    """torch, if the extension will be built and there is none to build it with."""
    return [] if why_no_extension() or torch_folder() else ["torch>={}.{}".format(*TORCH_FLOOR)]


def torch_folder() -> Path | None:
    """The folder of a torch to build with: the one that an import would find, else one that build isolation hides."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    # pip isolates by sys.path alone: the prefix is still the environment that it installs into.
    folders += [Path(folder, "torch") for folder in (*site.getsitepackages(), site.getusersitepackages())]
    return next((folder for folder in folders if torch_version(folder, TORCH_FLOOR)), None)


def torch_version(folder: Path, floor: tuple[int, int]) -> str | None:
    """The version of the torch in this folder; None without one that is `floor` or newer, and has its headers."""
    try:
        text = folder.joinpath("version.py").read_text()
    except OSError:
        return None
    version = re.search(r"^__version__ = '((\d+)\.(\d+).*)'", text, re.MULTILINE)
    is_one = version and (int(version[2]), int(version[3])) >= floor and folder.joinpath("include").is_dir()
    return version[1] if is_one else None


def why_no_extension() -> str | None:
    """Why the extension is not even tried on this machine, whatever torch there is; None to try."""
    if os.environ.get("WAVLM_FAST_NO_EXTENSION", "0") not in ("", "0"):
        return "WAVLM_FAST_NO_EXTENSION is set"
    command = compiler_command()
    if shutil.which(command[0]) is None:
        return f"no C++ compiler found ({command[0]} does not exist)"
    if not compiles(command, PROBE):
        return f"the C++ compiler {command[0]} lacks the vector extensions of GCC 9 and clang"
    return None


def compiler_command() -> list[str]:
    """The C++ compiler."""
    return shlex.split(os.environ.get("CXX") or ("cl" if os.name == "nt" else "c++"))


def compiles(command: list[str], probe: str, flags: tuple[str, ...] = ()) -> bool:
    """Whether the compiler takes the probe with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(probe)
        run = [*command, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(run, capture_output=True, check=False).returncode == 0
