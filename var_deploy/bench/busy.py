"""Processes of other work that keep processors busy while `bench` measures.

Each process computes without a pause and competes for the processors as any other program does; the
system decides where it runs. A process ends by itself when its stdin is closed, so none outlives
`bench`, whichever way `bench` ends.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence

from var_deploy.errors import BackendError
from var_deploy.host.installation import code_command

# A thread waits for the end of stdin, the main thread computes. `os._exit` ends both at once. The
# waiting thread sleeps in `read` without the interpreter's lock, so it takes no time.
COMPUTE = """
import os, sys, threading
def wait():
    sys.stdin.buffer.read()
    os._exit(0)
threading.Thread(target=wait, daemon=True).start()
print("busy", flush=True)
number = 1
while True:
    number = number * 1103515245 % 2147483647
"""


@contextlib.contextmanager
def busy_processors(count: int, command: Sequence[str] | None = None) -> Iterator[list[int]]:
    """Run `count` processes of other work within the context; yields their process numbers.

    All of them compute when the context begins, and have ended when it is left.

    Args:
        command: the program of each process; it prints a line when it begins to compute.

    Raises BackendError where a process cannot be started.
    """
    command = code_command(COMPUTE) if command is None else command
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(_process(command)) for _ in range(count)]
        for process in started:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise BackendError(
                    f"a process of other work ended with exit code {process.wait()} instead of "
                    "computing; leave out --busy"
                )
        yield [process.pid for process in started]
        for process in started:
            if process.poll() is not None:
                raise BackendError(
                    f"a process of other work ended with exit code {process.returncode} while the "
                    "runtimes were measured; run bench again"
                )


@contextlib.contextmanager
def _process(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches `bench` alone, which ends the process
        )
    except OSError as error:
        raise BackendError(f"{command[0]} cannot be started: {error.strerror}") from None
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
