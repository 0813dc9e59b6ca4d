"""A command as one of several ranks that torchrun has started."""

from __future__ import annotations

import argparse
import os
import signal
from threading import Timer, current_thread, main_thread
from typing import TYPE_CHECKING

from taylorseer_export.values import real

if TYPE_CHECKING:
    from taylorseer_export.runtime.group import Group

_FIRST, _OTHERS = 5.0, 30.0  # s that a signal to end leaves rank 0, and those that it lets go


def rank_option(parser: argparse.ArgumentParser) -> None:
    """How long ranks wait for each other."""
    parser.add_argument(
        "--rank-timeout",
        type=real(0),
        metavar="SECONDS",
        default=60.0,
        help="under torchrun, time after which a rank that does not answer is given up, and all others end with its "
        "name (default: %(default)g)",
    )


def joined(given: argparse.Namespace) -> Group | None:
    """The ranks that torchrun started, of which this is one; None in a process that is alone.

    torchrun ends all ranks when one has died. The others are given the time to say which, and why.

    Raises:
        ConfigError: A rank is not there.
    """
    from taylorseer_export.runtime.group import Group

    group = Group.from_environment(given.device, given.rank_timeout)
    if group is not None:
        _end_later(_OTHERS if group.rank else _FIRST)
    return group


def _end_later(seconds: float) -> None:
    """Let SIGTERM do what it does only so many seconds after it has come."""
    if current_thread() is not main_thread():
        return
    usual = signal.getsignal(signal.SIGTERM)

    def later(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, usual)
        again = Timer(seconds, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    signal.signal(signal.SIGTERM, later)
