"""The errors this project raises: one sentence each, `<what> is <seen>, expected <what>; <the fix>`.

Every error is raised before the work it is about starts. The command line prints the sentence alone, without a
traceback, and exits with `exit_code`: 2 for bad usage or input, 1 for a check that ran and failed.
"""

import re


class TaylorSeerError(Exception):
    """Base of every error raised on purpose here; catch this one to catch them all.

    Args:
        message: The sentence. What it quotes of a file or a request may be anything: line breaks become spaces, and
            what does not print (escape codes, marks that turn the writing direction) its escape, like `\\x1b`.
    """

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        line = re.sub(r"\s*[\n\r]\s*", " ", str(message))
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


class ConfigError(TaylorSeerError, ValueError):
    """The request contradicts itself or names what does not exist; nothing was done."""


class CheckpointError(TaylorSeerError):
    """A model folder or hub id is missing, damaged, or not of the family that was asked for."""


class ExportError(TaylorSeerError):
    """The model could not be traced or split; names the site or node."""


class BuildError(TaylorSeerError):
    """An engine builder refused a graph, or the builder is not installed."""


class BundleError(TaylorSeerError):
    """A bundle is missing, damaged, too new, or not made for this machine; names the file."""


class StepError(TaylorSeerError):
    """The denoiser was called out of order, or with tensors of another shape, dtype or range."""


class RankError(StepError):
    """A rank has died, is late, or is elsewhere: the ranks of its group do nothing more together; names it."""


class ParityError(TaylorSeerError):
    """A difference exceeds its derived bound; names output, step, what was seen, and the bound."""

    exit_code = 1


class ServeError(TaylorSeerError):
    """A server refused a request or gave it up.

    Args:
        message: The sentence.
        status: Why, as Triton names it: `UNAVAILABLE` (try again), `CANCELLED`, `INTERNAL`.
    """

    exit_code = 1

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status


def first_line(problem: BaseException | str) -> str:
    """The first line of what another library says, for our one sentence; the class of an error that says nothing."""
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
