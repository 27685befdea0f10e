"""The command line: parses a command, runs it, and reports a failure as one line and an exit code.

See docs/settings.md.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from d2filter import signals
from d2filter.cli.parser import parse
from d2filter.cli.printing import print_error
from d2filter.errors import D2FilterError

_BROKEN_PIPE = 128 + signal.SIGPIPE


def entry() -> NoReturn:
    """Run the console script `d2filter`."""
    program(main)


def program(run: Callable[[], int]) -> NoReturn:
    """Call `run` and end the process with its exit code.

    Characters that the terminal's encoding lacks are printed as escapes. If the reader of stdout
    goes away, as in `| head`, the program ends without a message.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code: int | str | None
    try:
        try:
            code = run()
        except SystemExit as ended:  # of --help and --version
            code = ended.code
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        code = _BROKEN_PIPE
    if code == _BROKEN_PIPE:
        # Python flushes these streams once more when it ends
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if signals.received() and isinstance(code, int):
        # everything is stopped; another signal could still interrupt Python's own clean-up
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. argv: words of the command; None: those of Python."""
    with signals.raising():
        try:
            arguments = parse(sys.argv[1:] if argv is None else argv)
            arguments.handler(arguments)
        except KeyboardInterrupt:
            return _interrupted()
        except D2FilterError as error:
            if signals.received():  # the error may be a consequence of the signal
                return _interrupted()
            return _failed(str(error), error.exit_code)
        except BrokenPipeError as error:
            if _stdout_is_gone():
                return _BROKEN_PIPE
            return _failed(str(error), 1)
        except OSError as error:
            place = f" ({error.filename})" if error.filename else ""
            return _failed(f"{error.strerror or error}{place}", 1)
    return 0


def _failed(text: str, code: int) -> int:
    print_error(f"d2filter: error: {text}")
    return code


def _interrupted() -> int:
    number = signals.received() or signal.SIGINT
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    with contextlib.suppress(OSError):  # the terminal may be gone
        print_error(f"d2filter: interrupted{by}; run the same command again, it keeps what is done")
    return 128 + number


def _stdout_is_gone() -> bool:
    """Whether stdout has no reader any more: output that was not written then fails to flush."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False
