"""What pyproject.toml cannot say: folders that are packages of wavlm_fast, and the C++ extension `wavlm_fast._C`.

How csrc/ is built:
- `csrc/*.cpp` are compiled once, for the baseline of the platform. They hold the checked entries and registrations.
- `csrc/*_kernel.cpp` are compiled once per level of LEVELS that the compiler knows, each time with
  WAVLM_FAST_ISA set to the level's namespace. They see raw pointers only (csrc/vec.h), never torch's headers:
  an inline function of a shared header compiled for AVX-512 could be the copy that the linker keeps for everybody.
- csrc/dispatch.h picks one level per process. A new op is new files in csrc/; nothing here changes.
- Objects stay in build/, and are compiled again when a file that they include, a flag, the compiler or torch changes.

torch lends its headers and is not imported (build_backend.py says which torch, and who has the compiler's name). What
keeps a machine from compiling ends as one sentence, printed once and written to `wavlm_fast/_build.json`, where
`wavlm-fast doctor` and `wavlm_fast.report` find it. Variables: WAVLM_FAST_NO_EXTENSION=1 leaves the extension out; CXX
is the compiler and MAX_JOBS how many of it run at once; CXXFLAGS and LDFLAGS are as everywhere; WAVLM_FAST_CXXFLAGS
follows all flags of every compilation and of the linker: WAVLM_FAST_CXXFLAGS="-g -fsanitize=address".
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(
        f"wavlm-fast is built by setuptools 77 or newer, this is {setuptools.__version__}: pip install -U setuptools, "
        "or leave out --no-build-isolation"
    )

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

from build_backend import PROBE, TORCH_FLOOR, compiler_command, compiles, torch_folder, torch_version, why_no_extension

FOLDERS = ["wavlm_fast.kernels", "wavlm_fast.benchmarks"]  # wavlm_fast/_folders.py finds them in a checkout
# Level name -> flags, by processor. Order is slowest first, as in csrc/dispatch.h.
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mprefer-vector-width=512")
X86_LEVELS = {
    "default": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": AVX512_FLAGS,
    "avx512_bf16": (*AVX512_FLAGS, "-mavx512bf16"),
}
# NEON is in every such processor. macOS, which calls it arm64, is not asked for bfloat16 and has the first level alone.
ARM_LEVELS = {"default": (), "neon_bf16": ("-march=armv8.2-a+bf16",)}
LEVELS = {"x86_64": X86_LEVELS, "amd64": X86_LEVELS, "aarch64": ARM_LEVELS}
COMPILE_FLAGS = ("-O3", "-g0", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# One file runs under TORCH_FLOOR and every newer torch: what the stable interface got later is not declared.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*TORCH_FLOOR)
FASTER_FLAGS = ("-fno-math-errno", "-fno-trapping-math")  # where the compiler knows them
# What csrc/tiles.h asks of the assembler, which may be older than the compiler.
TILES_PROBE = 'void probe() { asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }'
NO_TORCH = (
    "wavlm-fast's C++ kernels are built with the headers of torch {}.{} or newer, and this environment has none: "
    "pip install torch first, or leave out --no-build-isolation. WAVLM_FAST_NO_EXTENSION=1 installs without kernels."
).format(*TORCH_FLOOR)


def main() -> None:
    """Run setup."""
    reason = why_no_extension()
    kernels = sorted(str(path) for path in Path("csrc").glob("*_kernel.cpp"))
    entries = sorted({str(path) for path in Path("csrc").glob("*.cpp")} - set(kernels))
    extension = Extension("wavlm_fast._C", entries, depends=kernels, language="c++")
    folders = {package: package.rpartition(".")[2] for package in FOLDERS}
    inner = [f"{package}.{name}" for package, folder in folders.items() for name in find_packages(folder)]
    setup(
        packages=[*find_packages(include=["wavlm_fast", "wavlm_fast.*"]), *FOLDERS, *inner],
        package_dir=folders,
        package_data={
            "wavlm_fast": ["_build.json", "data/*", "py.typed"],
            "wavlm_fast.kernels": ["tuned.json"],
        },
        ext_modules=[] if reason else [extension],
        cmdclass={"build_py": record_in_build_py(reason), "build_ext": BuildExtension, "bdist_wheel": AnyPythonWheel},
    )


def available_levels(command: list[str]) -> dict[str, tuple[str, ...]]:
    """The levels of the processor that the compiler compiles for, as far as it knows them."""
    levels = LEVELS.get(machine_of(command), {"default": ()})
    return {name: flags for name, flags in levels.items() if compiles(command, PROBE, flags)}


def machine_of(command: list[str]) -> str:
    """The processor that the compiler compiles for, which need not be this one."""
    said = subprocess.run([*command, "-dumpmachine"], capture_output=True, text=True, check=False).stdout
    return (said.partition("-")[0].strip() or platform.machine()).lower()


def flags_of(variable: str) -> list[str]:
    """The flags in an environment variable."""
    return shlex.split(os.environ.get(variable, ""))


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


class BuildExtension(build_ext):
    """csrc/ compiled side by side, the kernels once per level. A compiler that fails stops no installation."""

    def run(self) -> None:
        torch = torch_folder()
        if torch is None:
            sys.exit(NO_TORCH)
        self.torch, self.compiler_command = torch, compiler_command()
        self.levels = available_levels(self.compiler_command)
        self.built_with = {
            "torch": torch_version(torch, TORCH_FLOOR),
            "compiler": version_of(self.compiler_command),
        }
        record = {**self.built_with, "levels": list(self.levels), "sources": digest_of_sources()}
        folder = Path("." if self.inplace else self.build_lib, "wavlm_fast")  # a run that fails forgets inplace
        try:
            super().run()
        except Exception as error:
            print(error, file=sys.stderr)
            record = {"failed": "compiling csrc/ failed, the log of pip install -v shows where"}
        write_record(folder, record)

    def get_ext_filename(self, fullname: str) -> str:
        """The file of an extension: no Python API is in it, so it is one for all."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile what has changed, and link."""
        command, users = self.compiler_command, flags_of("WAVLM_FAST_CXXFLAGS")
        known = [flag for flag in FASTER_FLAGS if compiles(command, "", ("-Werror", flag))]
        tiles = ("-DWAVLM_FAST_HAVE_TILES=1",) if compiles(command, TILES_PROBE) else ()
        common = [*flags_of("CXXFLAGS"), *COMPILE_FLAGS, *known, "-Icsrc"]
        have = [f"-DWAVLM_FAST_HAVE_{name.upper()}=1" for name in self.levels]
        of_entries = [*common, *have, TORCH_TARGET, f"-isystem{self.torch}/include", *users]
        folder = Path("build", f"objects-{machine_of(command)}{'-own-flags' if users else ''}")
        jobs = [(folder / "entries", source, of_entries) for source in ext.sources]
        for name, flags in self.levels.items():
            more = tiles if name == "avx512_bf16" else ()
            of_level = [*common, *flags, *more, f"-DWAVLM_FAST_ISA=isa_{name}", *users]
            jobs += [(folder / name, kernel, of_level) for kernel in ext.depends]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(lambda job: self.compile(*job), jobs))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        # torch has parts of the C++ library in it, which another torch may not have: the system's comes first.
        libraries = [*(["-lstdc++"] if sys.platform == "linux" else []), f"-L{self.torch}/lib", "-ltorch_cpu"]
        more = [*flags_of("LDFLAGS"), *users, "-o", str(output)]
        run([*command, "-shared", *map(str, objects), *libraries, *more])

    def compile(self, folder: Path, source: str, flags: list[str]) -> Path:
        """The object of a source, compiled unless it is there and nothing that it is made of has changed."""
        made, depends, how = (folder / f"{Path(source).stem}{suffix}" for suffix in (".o", ".d", ".how"))
        command = [*self.compiler_command, *flags, "-MMD", "-c", source, "-o", str(made)]
        said = json.dumps([command, self.built_with])
        if made.exists() and how.exists() and how.read_text() == said and is_newer(made, depends):
            return made
        made.parent.mkdir(parents=True, exist_ok=True)
        how.unlink(missing_ok=True)
        run(command)
        how.write_text(said)
        return made


def is_newer(made: Path, depends: Path) -> bool:
    """Whether an object is newer than every file that the compiler read for it."""
    files = re.split(r"(?<!\\)\s+", depends.read_text().replace("\\\n", " ").partition(": ")[2].strip())
    try:
        return max(Path(file.replace("\\ ", " ")).stat().st_mtime_ns for file in files) < made.stat().st_mtime_ns
    except FileNotFoundError:
        return False


def run(command: list[str]) -> None:
    """Run a compiler. What it says is printed in one piece, as others run beside it."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(f"{shlex.join(command)}\n{result.stdout}", end="", flush=True)
    if result.returncode != 0:
        raise RuntimeError(f"{command[0]} failed with status {result.returncode}")


def version_of(command: list[str]) -> str:
    """The first line of the compiler's --version."""
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return (result.stdout.splitlines() or ["unknown"])[0]


class AnyPythonWheel(bdist_wheel):
    """A wheel for any Python 3 of one platform: the extension is loaded by torch, not imported."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag, with the platform where an extension is inside."""
        _, _, platform_tag = super().get_tag()
        # A Mac's Python may be of two architectures, what it compiles is of one.
        return "py3", "none", platform_tag.replace("universal2", platform.machine())


main()
