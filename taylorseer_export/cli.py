"""The command line: families export, verbs use what was exported.

Every verb exits 0 on success, 1 on a failed check, 2 on bad usage or input, with one sentence and no traceback.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Timer, current_thread, main_thread
from typing import Any

from taylorseer_export.commands import VERBS, export
from taylorseer_export.commands.options import PROGRAM, Parser
from taylorseer_export.errors import ConfigError, TaylorSeerError
from taylorseer_export.families import FAMILIES, family_named
from taylorseer_export.families.family import Family

_CUT_SHORT = 141  # what a shell reports for a program that SIGPIPE ended
_BY_SIGNAL = 128  # plus the number of the signal: what a shell reports for a program that another one ended
_GRACE = 5  # seconds of tidying that no further signal cuts short; `timeout` sends two at once
_AGAIN = 0.05  # seconds until a signal whose exception was lost is sent again


class _Ended(KeyboardInterrupt):
    """A signal that ends the command: everything that tidies up after Ctrl-C does so after this one too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    A reader that leaves early, like `head`, ends the command quietly. A command that was already done keeps its code.
    """
    code: Any = _CUT_SHORT
    try:
        try:
            with _endings_raised():
                code = _answer(list(sys.argv[1:] if arguments is None else arguments))
        except SystemExit as leaving:  # argparse, after its help
            code = leaving.code
            raise
        finally:
            sys.stdout.flush()
    except OSError as error:  # of standard output; all others were answered
        with suppress(OSError):  # or the interpreter's own last flush would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            code = _say(f"standard output is not writable ({error.strerror}), expected room on it; mend that", 2)
    return int(code or 0)


def _answer(arguments: list[str]) -> int:
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_help())
            return 0
        if arguments[0] == "--version":
            from importlib.metadata import version

            print(version("taylorseer-export"))
            return 0
        command, rest = arguments[0], arguments[1:]
        if command in VERBS:
            verb = VERBS[command]
            parser = Parser(command, verb.SUMMARY)
            verb.options(parser)
            return int(verb.run(parser.parse_args(rest)))
        family = _family_or_verb(command)
        parser = Parser(family.name, f"Export {family.title} as a bundle of engines.")
        export.options(parser, family)
        return export.run(family, parser.parse_args(rest))
    except TaylorSeerError as error:
        return _say("\n".join([str(error), *getattr(error, "__notes__", ())]), error.exit_code)
    except _Ended as ended:
        (number,) = ended.args
        return _say(
            f"the command was ended by {number.name}; nothing half-written was left, run it again", number + _BY_SIGNAL
        )
    except KeyboardInterrupt:
        return _say("the command was interrupted; nothing half-written was left, run it again", 2)
    except MemoryError as error:
        why = f" ({error})" if str(error) else ""
        return _say(f"memory is not enough for what was asked{why}, expected room for it; ask for less", 2)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _say(
            f"{error.filename or 'a file'} is not usable ({error.strerror}), expected access to it; mend that", 2
        )


@contextmanager
def _endings_raised() -> Iterator[None]:
    """Raise `_Ended` where SIGTERM or SIGHUP would end the process; one that is ignored or handled stays so.

    Python drops what is raised within a finalizer or the callback of a weak reference, of which an export has millions:
    such a signal, or Ctrl-C, is sent again.
    """

    last = -math.inf
    said = sys.unraisablehook

    def end(number: int, frame: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > _GRACE:
            raise _Ended(signal.Signals(number))

    def lost(what: sys.UnraisableHookArgs) -> None:
        nonlocal last
        if not isinstance(what.exc_value, KeyboardInterrupt) or current_thread() is not main_thread():
            return said(what)
        last = -math.inf
        (number,) = what.exc_value.args or (signal.SIGINT,)
        Timer(_AGAIN, os.kill, (os.getpid(), number)).start()

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    found = [n for n in numbers if current_thread() is main_thread() and signal.getsignal(n) == signal.SIG_DFL]
    for number in found:
        signal.signal(number, end)
    sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = said
        for number in found:
            signal.signal(number, signal.SIG_DFL)


def _say(sentence: str, code: int) -> int:
    print(f"{PROGRAM}: {sentence}", file=sys.stderr)
    return code


def _family_or_verb(command: str) -> Family:
    from difflib import get_close_matches

    if command not in FAMILIES and (close := get_close_matches(command, VERBS, n=1)):
        raise ConfigError(f"command is `{command}`, expected a family or a verb; did you mean `{close[0]}`?")
    return family_named(command)


def _help() -> str:
    """The first page: families in one group, verbs in another."""
    width = max(map(len, (*FAMILIES, *VERBS))) + 2
    lines = [
        f"usage: {PROGRAM} FAMILY [options]      export a model as a bundle of engines",
        f"       {PROGRAM} VERB BUNDLE [options] use a bundle",
        "",
        "Compiles a diffusion transformer into a full graph and a forecast graph with explicit Taylor buffers.",
        "",
        "families:",
    ]
    for family in FAMILIES.values():
        lines.append(f"  {family.name:<{width}}{family.title}")
    lines += ["", "verbs:"]
    lines += [f"  {name:<{width}}{verb.SUMMARY}" for name, verb in VERBS.items()]
    lines += ["", f"`{PROGRAM} FAMILY --help` and `{PROGRAM} VERB --help` list the options with units and defaults."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
