"""Installations in throw-away virtual environments, without a network."""

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import setuptools

ROOT = Path(__file__).parents[2]
# What a build leaves behind, and what git would not clone.
LEFTOVERS = (".git", ".venv*", ".*_cache", "build", "dist", "results", "*.egg-info", "__pycache__")
LEFTOVERS += ("_C*.so", "_build.json")
SAID = "wavlm-fast is installed without its C++ extension"


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees the packages of the one running the tests, behind its own."""

    folder: Path

    @classmethod
    def running(cls):
        """The environment that runs the tests."""
        return cls(Path(sys.prefix))

    @classmethod
    def create(cls, folder):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        environment = cls(folder)
        # Lines of a .pth file are put on the path without running the .pth files of the folders they name, so an
        # editable wavlm-fast out there is not seen in here.
        outside = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        environment.site_packages.joinpath("outside.pth").write_text("\n".join(outside) + "\n")
        return environment

    @property
    def site_packages(self):
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.folder), "platbase": str(self.folder)}))

    def python(self, *arguments, cwd, check=True, **variables):
        """Run the environment's Python; stdout and stderr together."""
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
        run = subprocess.run(
            [str(self.folder / "bin" / Path(sys.executable).name), *map(str, arguments)],
            cwd=cwd,
            env={**inherited, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert not check or run.returncode == 0, run.stdout
        return run.stdout

    def install(self, *what, cwd, **variables):
        """pip install, from what is on this machine alone. The log."""
        options = ("--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "-v")
        return self.python("-m", "pip", "install", *options, *what, cwd=cwd, **variables)


def only_setuptools(folder):
    """A folder for PYTHONPATH with the setuptools of the environment that runs the tests, and nothing else of it."""
    folder.mkdir()
    site_packages = Path(setuptools.__file__).parent.parent
    for found in (*site_packages.glob("setuptools*"), site_packages / "_distutils_hack"):
        folder.joinpath(found.name).symlink_to(found)
    return folder


def make_clone(folder, with_objects=False):
    """A copy of the repository as a clone would be; with the objects of what is compiled already, sooner built."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFTOVERS))
    for objects in ROOT.glob("build/objects-*") if with_objects else ():
        shutil.copytree(objects, folder / "build" / objects.name)
    return folder


def add_stand_in(environment):
    """Install a package that is called `kernels`, as transformers knows one."""
    environment.site_packages.joinpath("kernels").mkdir()
    environment.site_packages.joinpath("kernels", "__init__.py").write_text("STAND_IN = True\n")
    environment.site_packages.joinpath("which_kernels.py").write_text(
        "import kernels\nassert kernels.STAND_IN\nprint('the stand-in')\n"
    )
