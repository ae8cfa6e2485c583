"""A process that has imported what pages need, and forks for each page and for each `wavlm-fast` in it.

Importing takes seconds, running a page on tiny models a fraction of one. The process itself runs no model, so that what
it forks may.

    python doc_server.py SOCKET FOLDER

makes the hub cache and, in FOLDER, what pages find; then it answers each connection, which sends standard input, output
and error, and as JSON what to do in which folder: {"page": file, "folder": ...} or {"command": [words], "folder": ...,
"environment": {...}}. The answer is the exit status.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

MOST = 1 << 20  # bytes of a request
LIMIT = 120  # seconds that anything may take
# What a shell sets by itself, and what is read at each call: no reason for a process that imports everything again.
_MAY_DIFFER = ("_", "PATH", "PWD", "OLDPWD", "SHLVL", "COLUMNS", "LINES", "WAVLM_FAST_BACKEND")


def ask(address: str, request: dict[str, Any], streams: tuple[int, int, int] = (0, 1, 2)) -> int:
    """Have something done with these standard streams; the exit status, or 1 if whoever did it was killed."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        text = json.dumps(request).encode() + b"\n"
        connection.sendall(text[socket.send_fds(connection, [text], streams) :])
        answer = connection.recv(16)
    return int(answer or 1)


def main(address: str, folder: str) -> None:
    import doc_hub
    import doc_page
    import huggingface_hub.constants
    import transformers

    import wavlm_fast
    from wavlm_fast import batches, demo, doctor, extract  # noqa: F401

    for name in wavlm_fast.__all__:
        getattr(transformers, name, None)  # which it imports at first use
    maker = os.fork()
    if maker == 0:
        doc_hub.write_hub(Path(huggingface_hub.constants.HF_HUB_CACHE))
        doc_hub.write_folder(Path(folder))
        os._exit(0)
    if os.waitpid(maker, 0)[1] != 0:
        sys.exit("the tiny models could not be made")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{address}.new")
        server.listen()
        os.rename(f"{address}.new", address)  # there once it answers
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _answer(connection, doc_page.run)
            connection.close()


def _answer(connection: socket.socket, run_page: Any) -> None:
    """Do what is asked for, in this forked process, and end it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.alarm(LIMIT)
    text, streams, _, _ = socket.recv_fds(connection, MOST, 3)
    while not text.endswith(b"\n"):
        text += connection.recv(MOST)
    for own, given in enumerate(streams):
        os.dup2(given, own)
        os.close(given)
    request = json.loads(text)
    status = 1
    try:
        os.chdir(request["folder"])
        if "page" in request:
            status = run_page(request["page"])
        else:
            status = _command(request["command"], request["environment"])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(str(status).encode())
        os._exit(0)


def _command(words: list[str], environment: dict[str, str]) -> int:
    same = all(
        name in _MAY_DIFFER or environment.get(name) == os.environ.get(name) for name in {*environment, *os.environ}
    )
    os.environ.clear()
    os.environ.update(environment)
    if not same:  # other variables may be read when something is imported
        return os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-m", "wavlm_fast", *words])
    from wavlm_fast import cli

    sys.argv = ["wavlm-fast", *words]
    return cli.main(words)


if __name__ == "__main__":
    main(*sys.argv[1:])
