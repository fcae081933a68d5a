"""The command line in a process of its own, forked from one that has imported it: what imports cost is paid once.

Half of the processor time of a short command is imports. `tests/conftest.py` starts one of these for a worker of pytest
(``python -m tests.forked FD``), and it runs nothing but what it is sent: it has no threads, and no state of a command
before. A command has its own environment, streams, signals, exit handlers and end, as if it were started; what has to
start whole (a cold start, a command that is killed, Python's own variables) is started.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import socket
import sys
import threading

import harness

APART = ("harness.cluster", "harness.scenarios")
"""Ray, and Locust with its patches: the command line starts them in processes of their own, or late."""


def serve(channel: socket.socket) -> list[str] | None:
    """Fork for each command that comes; the arguments, in the process of a command. Null: no more commands."""
    while True:
        message, files, _, _ = socket.recv_fds(channel, 1 << 20, 2)
        if not message:
            return None
        pid = os.fork()
        if not pid:
            channel.close()
            asked = json.loads(message)
            os.environ.clear()
            os.environ.update(asked["env"])
            os.chdir(asked["cwd"])
            for file, stream in zip(files, (1, 2), strict=True):
                os.dup2(file, stream)
                os.close(file)
            arguments: list[str] = asked["arguments"]
            return arguments
        for file in files:
            os.close(file)
        channel.send(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        channel.send(f"{os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    harness.forgo_pandas()  # as `harness.cli.main` does before it imports more
    for module in pkgutil.walk_packages(harness.__path__, "harness."):
        if not module.name.startswith(APART) and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()
    arguments = serve(socket.socket(fileno=int(sys.argv[1])))
    if arguments is not None:
        sys.argv = ["harness", *arguments]
        try:
            runpy.run_module("harness", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if not isinstance(end.code, int):
                raise
            # As Python ends, without taking apart all that was imported: half the time of a short command.
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
