"""What pyproject.toml cannot say: folders that are packages of wavlm_fast, and the C++ extension `wavlm_fast._C`.

How csrc/ is built:
- `csrc/*.cpp` are compiled once, for the baseline of the platform. They hold the checked entries and registrations.
- `csrc/*_kernel.cpp` are compiled once per level of LEVELS that the compiler knows, each time with
  WAVLM_FAST_ISA set to the level's namespace. They see raw pointers only (csrc/vec.h), never torch's headers:
  an inline function of a shared header compiled for AVX-512 could be the copy that the linker keeps for everybody.
- csrc/dispatch.h picks one level per process. A new op is new files in csrc/; nothing here changes.

The extension is optional. Whatever keeps it from being built ends as one sentence, printed once and written to
`wavlm_fast/_build.json`, where `wavlm-fast doctor` and `wavlm_fast.report` find it. WAVLM_FAST_NO_EXTENSION=1 skips it.
It is built against the installed torch: pip install --no-build-isolation.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

FOLDERS = ["wavlm_fast.kernels", "wavlm_fast.benchmarks"]  # wavlm_fast/_folders.py finds them in a checkout
# Level name -> flags. Order is slowest first, as in csrc/dispatch.h.
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mprefer-vector-width=512"]
LEVELS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512_FLAGS,
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16"],
}
COMPILE_FLAGS = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
# The probe is what csrc/vec.h and csrc/dispatch.cpp ask of the compiler, so that a level is dropped, not fatal.
PROBE = """
typedef float floats __attribute__((vector_size(64)));
typedef unsigned words __attribute__((vector_size(64)));
words probe(floats x) { return __builtin_convertvector(x, words); }
#if defined(__AVX512BF16__)
bool cpu() { return __builtin_cpu_supports("avx512bf16"); }
#endif
"""
# at::parallel_for is a plain loop in what is compiled without OpenMP. The loop then calls into the runtime that torch
# has loaded, which is GCC's: other compilers would bring a second one, with a second pool of threads.
OPENMP_PROBE = """
#if !defined(_OPENMP) || defined(__clang__)
#error no OpenMP for torch's runtime
#endif
"""


def main() -> None:
    """Run setup."""
    reason = reason_not_to_try()
    classes: dict[str, type] = {"build_py": record_in_build_py(reason), "bdist_wheel": AnyPythonWheel}
    extensions = []
    if reason is None:
        classes["build_ext"] = extension_builder()
        kernels = sorted(str(path) for path in Path("csrc").glob("*_kernel.cpp"))
        entries = sorted({str(path) for path in Path("csrc").glob("*.cpp")} - set(kernels))
        extensions = [Extension("wavlm_fast._C", entries, depends=kernels, language="c++", optional=True)]
    folders = {package: package.rpartition(".")[2] for package in FOLDERS}
    inner = [f"{package}.{name}" for package, folder in folders.items() for name in find_packages(folder)]
    setup(
        packages=[*find_packages(include=["wavlm_fast", "wavlm_fast.*"]), *FOLDERS, *inner],
        package_dir=folders,
        package_data={"wavlm_fast": ["_build.json", "data/*"]},
        ext_modules=extensions,
        cmdclass=classes,
    )


def compiler_command() -> list[str]:
    """The C++ compiler, as torch.utils.cpp_extension and setuptools would find it."""
    return shlex.split(os.environ.get("CXX") or ("cl" if os.name == "nt" else "c++"))


def reason_not_to_try() -> str | None:
    """Why the extension cannot be built here, known before any compiling; None to try."""
    if os.environ.get("WAVLM_FAST_NO_EXTENSION", "0") not in ("", "0"):
        return "WAVLM_FAST_NO_EXTENSION is set"
    try:
        importlib.import_module("torch.utils.cpp_extension")
    except ImportError as error:
        return f"torch is not importable where it is built ({error}); install torch first and use --no-build-isolation"
    command = compiler_command()
    if shutil.which(command[0]) is None:
        return f"no C++ compiler found ({command[0]} does not exist)"
    if not compiles(command, PROBE, []):
        return f"the C++ compiler {command[0]} lacks the vector extensions of GCC 9 and clang"
    return None


def compiles(command: list[str], probe: str, flags: list[str]) -> bool:
    """Whether the compiler takes the probe with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(probe)
        run = [*command, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(run, capture_output=True, check=False).returncode == 0


def available_levels(command: list[str]) -> dict[str, list[str]]:
    """The levels of LEVELS that exist on this platform and that the compiler knows."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"default": []}
    return {name: flags for name, flags in LEVELS.items() if compiles(command, PROBE, flags)}


def openmp_flags(command: list[str]) -> list[str]:
    """What makes at::parallel_for use torch's threads; nothing where the two do not share a runtime."""
    import torch

    flags = ["-fopenmp"]
    shared = "parallel backend: OpenMP" in torch.__config__.parallel_info() and compiles(command, OPENMP_PROBE, flags)
    return flags if shared else []


def digest_of_sources() -> str:
    """A name for the state of csrc/: backends/cpu/extension.py asks whether the extension is of these sources."""
    digest = hashlib.sha256()
    for path in sorted(Path("csrc").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def write_record(folder: Path, record: dict) -> None:
    """Leave how the build went beside the extension; without one, no stale extension stays either."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(record, indent=1) + "\n")
    if "failed" in record:
        for stale in folder.glob("_C*.so"):
            stale.unlink()
        print(f"wavlm-fast is installed without its C++ extension: {record['failed']}", file=sys.stderr)


def record_in_build_py(reason: str | None) -> type[build_py]:
    """The build_py that records why there is no extension to build."""

    class BuildPy(build_py):
        def run(self) -> None:
            super().run()
            if reason is not None:
                write_record(Path("." if self.editable_mode else self.build_lib, "wavlm_fast"), {"failed": reason})

    return BuildPy


def extension_builder() -> type[build_ext]:
    """torch's build_ext, with one more pass over the kernels per level, and no failure that stops an installation."""
    import torch
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs, no_python_abi_suffix=True)  # no Python API in it: one file for all

        def run(self) -> None:
            command = compiler_command()
            self.levels = available_levels(command)
            record = {
                "torch": torch.__version__,
                "compiler": version_of(command),
                "levels": list(self.levels),
                "sources": digest_of_sources(),
            }
            folder = Path("." if self.inplace else self.build_lib, "wavlm_fast")  # a run that fails forgets inplace
            try:
                super().run()
            except Exception as error:
                print(error, file=sys.stderr)
                record = {"failed": "compiling csrc/ failed, the log of pip install -v shows where"}
            write_record(folder, record)

        def build_extension(self, ext: Extension) -> None:
            ext.include_dirs += [str(Path("csrc").resolve()), *cpp_extension.include_paths()]
            ext.library_dirs += cpp_extension.library_paths()
            ext.libraries += ["c10", "torch", "torch_cpu"]
            ext.extra_compile_args += [*COMPILE_FLAGS, *openmp_flags(compiler_command())]
            ext.extra_compile_args += [f"-DWAVLM_FAST_HAVE_{name.upper()}=1" for name in self.levels]
            for name, flags in self.levels.items():
                ext.extra_objects += self.compiler.compile(
                    list(ext.depends),
                    output_dir=str(Path(self.build_temp, name)),
                    include_dirs=[str(Path("csrc").resolve())],
                    extra_postargs=[*COMPILE_FLAGS, *flags, f"-DWAVLM_FAST_ISA=isa_{name}"],
                )
            super().build_extension(ext)

    return BuildExtension


def version_of(command: list[str]) -> str:
    """The first line of the compiler's --version."""
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return (result.stdout.splitlines() or ["unknown"])[0]


class AnyPythonWheel(bdist_wheel):
    """A wheel for any Python 3 of one platform: the extension is loaded by torch, not imported."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag, with the platform where an extension is inside."""
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


main()
