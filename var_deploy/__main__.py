"""The program `var-deploy`, as its script and as `python -m var_deploy`.

Before commands are imported, which takes up to a third of a second, there is nothing to clean up:
Ctrl-C then ends the process on the spot. An exception in the middle of an import may be turned into
another one by the module that is imported, or be printed.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line; ends with SystemExit."""
    # a shell starts what runs in its background with Ctrl-C ignored, and that stays
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        signal.signal(signal.SIGINT, _leave)
    from var_deploy.host.terminal import open_standard_streams

    open_standard_streams()  # before anything else opens a file
    from var_deploy.cli.program import main as program

    program.prepare(sys.argv[1:])
    try:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        program(prog_name="var-deploy")
    except KeyboardInterrupt:  # between two handlers
        _leave()
    finally:
        if usual:  # nothing is left to be done but the interpreter's own end
            signal.signal(signal.SIGINT, _leave)


def _leave(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)  # terminal.INTERRUPTED, which may not be imported yet


if __name__ == "__main__":
    main()
