"""How the command line ends on a signal: Ctrl-C gives one line and status 130 at whatever moment it comes.

`wavlm_fast/__init__.py` comes here before anything else, because torch and transformers take seconds to import. In
a process that is not the command line nothing is touched. What Python does until then, some hundredths of a second, is
beyond us: nothing is imported here that it has not loaded already, not even `signal`, which needs `enum`.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]
import os
import sys

INTERRUPTED, TERMINATED = 130, 143  # as a shell tells them: 128 + the signal
_MODULES = ("wavlm_fast", "wavlm_fast.__main__", "wavlm_fast.cli", "wavlm_fast.benchmarks")
_SCRIPTS = ("wavlm-fast", "wavlm-fast.exe")
_TERMINATING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_guarding = False


class Terminated(BaseException):
    """SIGTERM, or the terminal is gone: raised where a command runs, so that it removes what it has not finished."""


def guard() -> None:
    """In a process of the command line, let Ctrl-C from now on end it at once: there is nothing yet to clean up.

    An exception would not do: imports are full of places that catch it, wrap it or cannot pass it on.
    """
    global _guarding
    # Whoever starts a process in the background of a script has Ctrl-C ignored there; that stays.
    if is_command_line() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
        _guarding = True


def is_command_line() -> bool:
    """Whether this process was started as `wavlm-fast`, `python -m wavlm_fast` or `python -m benchmarks`."""
    given, started = getattr(sys, "argv", None) or [""], getattr(sys, "orig_argv", [])
    if len(started) <= len(given):
        return False
    what = started[-len(given)]
    if given[0] == "-m":  # in place of the module that is still being looked for
        return what.removeprefix("-m") in _MODULES
    return (what == given[0] and os.path.basename(what) in _SCRIPTS) or _is_our_benchmarks()


def _is_our_benchmarks() -> bool:
    """`python -m benchmarks` comes here from its `__main__`, which `sys.argv` names by then."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    beside = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "benchmarks", "__main__.py")
    return spec is not None and spec.name == "benchmarks.__main__" and spec.origin == beside


class raising:  # noqa: N801 - used as a function is
    """While a command runs, raise KeyboardInterrupt and Terminated; before and after, where guarded, end at once."""

    def __enter__(self) -> None:
        self._guarding, self._hook = _guarding, sys.unraisablehook
        if not self._guarding:
            return
        sys.unraisablehook = _unraisable
        self._before = {number: signal.getsignal(number) for number in _TERMINATING}
        for number, handler in self._before.items():
            if handler == signal.SIG_DFL:  # `nohup` has SIGHUP ignored
                signal.signal(number, _terminate)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        if not self._guarding:
            return
        signal.signal(signal.SIGINT, _end)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook


def _end(number: int, frame: object) -> None:
    _quit(INTERRUPTED)


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def _unraisable(error: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised in a destructor, with a traceback; the user's wish to stop would be dropped too."""
    if issubclass(error.exc_type, KeyboardInterrupt):
        _quit(INTERRUPTED)
    elif issubclass(error.exc_type, Terminated):
        _quit(TERMINATED)
    else:
        sys.__unraisablehook__(error)


def _quit(status: int) -> None:
    os.write(2, b"wavlm-fast: interrupted\n" if status == INTERRUPTED else b"wavlm-fast: terminated\n")
    os._exit(status)
