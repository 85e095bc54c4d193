"""Running a command line: its verbs, its exit code, and one line for each error and warning.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a reproduction's bar does not hold or an
upgrade is not good enough, 2 wrong usage or input (one line on stderr, nothing written), 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from typing import Any

import typer

from .app import app
from .printing import say, short_line

_STOPPED = 130
"""The exit code after Ctrl-C; newer versions of typer return it, older ones raise Abort."""


def main() -> None:
    """Run the command line and exit with its code."""
    if hasattr(signal, "SIGPIPE"):
        # Where the reader of the output leaves early (`subspan list | head`), end like any other command.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for name in ("SIGTERM", "SIGHUP"):
        # Asked to end, tidy up first; what is ignored (by nohup) stays so.
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)
    sys.exit(run())


def _end(number: int, _: Any) -> None:
    sys.exit(128 + number)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (default: those of the process) and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that knows fewer characters, or a name that is not UTF-8, must not end the work.
            stream.reconfigure(errors="backslashreplace")
    said: set[str] = set()

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        """Each warning as one line, and once."""
        line = f"warning: {' '.join(str(message).split())}"
        if line not in said:
            said.add(line)
            say(line)

    with warnings.catch_warnings():
        warnings.showwarning = warn
        try:
            code = int(app(arguments, prog_name="subspan", standalone_mode=False) or 0)
        except (KeyboardInterrupt, typer.Abort):
            code = _STOPPED
        except Exception as error:
            if os.environ.get("SUBSPAN_TRACEBACK") or not _is_input_error(error):
                raise
            if type(error).__name__ != "NoArgsIsHelpError":  # the help is on the screen already
                say(f"error: {_one_line(error)}")
            code = 2
    if code == _STOPPED:
        say("stopped")
    return code


def _is_input_error(error: Exception) -> bool:
    """Whether the user can mend it: usage, values, files, missing extras. The rest is a defect, with its traceback."""
    return hasattr(error, "format_message") or isinstance(error, ValueError | TypeError | OSError | ImportError)


def _one_line(error: Exception) -> str:
    message = error.format_message() if hasattr(error, "format_message") else str(error)  # pyright: ignore
    # The library names its own argument first; here the file that it is about says which one is meant.
    return short_line(message.removeprefix("path: ")) or type(error).__name__
