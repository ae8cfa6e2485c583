"""The command line around its subcommands: help, refusals, endings."""

import os
import subprocess
import sys

import pytest

from wavlm_fast import cli
from wavlm_fast.errors import UserError


def in_new_process(*arguments, **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **variables}
    command = [sys.executable, "-m", "wavlm_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_help_names_every_command(command):
    ended = command("--help")
    assert ended.status == 0
    for name, summary in cli.COMMANDS.items():
        assert name in ended.out
        assert summary.split()[0] in ended.out


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "parity"])
def test_help_of_every_command(command, name):
    ended = command(name, "--help")
    assert ended.status == 0
    assert ended.out.startswith(f"usage: wavlm-fast {name}")
    assert "--" in ended.out


def test_version(command):
    assert command("--version").out.startswith("wavlm-fast 0.")


def test_no_command_and_an_unknown_one(command):
    assert command().sentence() == ("wavlm-fast: the following arguments are required: COMMAND (see wavlm-fast --help)")
    assert "invalid choice: 'sing'" in command("sing").sentence()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--dtype", "int8"), "argument --dtype: one of float32, bfloat16, float16 is wanted, got 'int8'"),
        (("--threads", "0"), "argument --threads: a whole number of at least 1 is wanted, got '0'"),
        (("--threads", "two"), "argument --threads: a whole number of at least 1 is wanted, got 'two'"),
        (("--device", "tpu"), "argument --device: cpu, cuda or cuda:N is wanted, got 'tpu'"),
        (("--max-seconds", "nan"), "argument --max-seconds: a number of seconds above 0 is wanted, got 'nan'"),
        (("--max-seconds", "-1"), "argument --max-seconds: a number of seconds above 0 is wanted, got '-1'"),
    ],
)
def test_arguments_that_are_refused(command, arguments, sentence):
    assert command("demo", *arguments).sentence() == f"wavlm-fast demo: {sentence} (see wavlm-fast demo --help)"


def test_a_gpu_that_is_not_there(command, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert (
        "torch sees no GPU on this machine, so 'cuda' cannot be used" in command("demo", "--device", "cuda").sentence()
    )


def test_dtypes_have_short_names(command, tiny, no_probe):
    ended = command("demo", "--model", tiny, "--dtype", "bf16", "--max-seconds", "1")
    assert ended.status == 0, ended
    assert "bfloat16" in ended.out


def test_an_unknown_backend_in_the_environment_is_refused_before_anything_loads(command, monkeypatch):
    monkeypatch.setenv("WAVLM_FAST_BACKEND", "abacus")
    sentence = command("demo", "--model", "/nowhere/at/all").sentence()
    assert sentence.startswith("wavlm-fast demo: the environment variable WAVLM_FAST_BACKEND must be one of 'auto'")
    assert sentence.endswith("got 'abacus'")


def test_a_command_that_this_installation_lacks(command, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "fly", "fly")
    assert command("fly").sentence() == (
        "wavlm-fast fly: the fly command is not part of this installation: there is no module wavlm_fast.fly"
    )


def test_a_command_whose_package_is_missing(command, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert command("doctor").sentence() == (
        "wavlm-fast doctor: the doctor command needs the package rich, which is not installed"
    )


def test_a_mistake_of_ours_is_no_user_error(monkeypatch, command):
    class Broken:
        add_arguments = staticmethod(lambda parser: None)

        @staticmethod
        def run(args):
            raise ValueError("a mistake in the code")

    monkeypatch.setattr(cli, "_module", lambda name: Broken)
    with pytest.raises(ValueError, match="a mistake in the code"):
        command("doctor")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(KeyboardInterrupt(), 130, "interrupted"), (UserError("two\nlines"), 2, "two lines")],
)
def test_endings(monkeypatch, command, error, status, said):
    class Ending:
        add_arguments = staticmethod(lambda parser: None)

        @staticmethod
        def run(args):
            raise error

    monkeypatch.setattr(cli, "_module", lambda name: Ending)
    ended = command("doctor")
    assert (ended.status, ended.err) == (status, f"wavlm-fast doctor: {said}\n")


def test_a_new_process_ends_with_one_sentence_and_status_2():
    done = in_new_process("demo", "no such file.wav")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "wavlm-fast demo: an audio file is wanted, but no such file.wav does not exist\n"
