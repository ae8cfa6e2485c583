"""The options of `pytest benchmarks`."""

from __future__ import annotations

import pytest
import torch

from wavlm_fast.benchmarks.ops.losers import FOUND, told
from wavlm_fast.benchmarks.ops.providers import DTYPES
from wavlm_fast.benchmarks.run.cases import MODELS


def pytest_addoption(parser: pytest.Parser) -> None:
    """What is measured."""
    group = parser.getgroup("wavlm-fast", "what the micro-benchmarks measure")
    group.addoption("--model", choices=MODELS, default="base", help="whose shapes (default: base)")
    group.addoption("--batch", type=int, default=1, help="utterances (default: 1)")
    group.addoption("--seconds", type=float, default=10.0, help="of each utterance (default: 10)")
    group.addoption("--dtype", choices=DTYPES, nargs="+", default=[*DTYPES], help="only providers in these")
    group.addoption("--device", default="cpu", help="cpu (default) or cuda")
    group.addoption("--threads", type=int, help="of torch (default: torch's own choice)")
    group.addoption("--peers", action="store_true", help="other libraries too, which are compiled for minutes")
    group.addoption("--all-sizes", action="store_true", help="never slower: long batches too, for many minutes")
    group.addoption("--patience", type=float, default=1.0, help="never slower: so many times the rounds (default: 1)")


def pytest_configure(config: pytest.Config) -> None:
    """Threads are set before anything runs on them."""
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which ops lost to plain torch."""
    if FOUND:
        heading, *lines = told(FOUND)
        terminalreporter.section(heading)
        terminalreporter.write("".join(f"{line}\n" for line in lines))
