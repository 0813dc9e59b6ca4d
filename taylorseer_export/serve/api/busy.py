"""What a busy server does with requests that leave their plan to it: it takes a faster profile of the same bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from taylorseer_export.bundle.profile import Profile
from taylorseer_export.errors import ConfigError
from taylorseer_export.method import Plan, RequestOptions


class Choice(NamedTuple):
    """The profile that a request is drawn with.

    Attributes:
        requested: The one that it named; None is none.
        used: The one that was taken; None is the request's own plan, or the bundle's.
        why: What led from one to the other; None where they are the same.
    """

    requested: str | None
    used: str | None
    why: str | None


@dataclass(frozen=True)
class Busy:
    """From when on a server is busy, and what it draws with then.

    Attributes:
        queue: Most pictures that wait for a model while it is not busy.
        profile: Name of a profile that every bundle has.
    """

    queue: int
    profile: str

    def check(self, name: str, plan: Plan, profiles: Mapping[str, Profile]) -> None:
        """Refuse a profile that would not help.

        Args:
            name: Of the bundle.
            plan: That it draws with by itself.
            profiles: That it has, by name.

        Raises:
            ConfigError: It has none of that name, or one with as many full steps as its own plan, or more.
        """
        if self.profile not in profiles:
            raise ConfigError(
                f"--busy-profile is {self.profile[:64]}, expected a profile of {name} "
                f"({', '.join(profiles) or 'it has none'}); make it with `taylorseer-export calibrate`, or name another"
            )
        fast, own = profiles[self.profile].plan.count("F"), str(plan).count("F")
        if fast >= own:
            raise ConfigError(
                f"--busy-profile {self.profile} has {fast} full steps for {name}, expected fewer than the {own} of its "
                "own plan; name a faster one"
            )


def chosen(busy: Busy | None, options: RequestOptions, waiting: int) -> Choice:
    """The profile of a request; its own if it says anything of steps, plans, profiles or guards.

    Args:
        busy: Of the server; None where it never chooses.
        options: Of the request.
        waiting: Pictures that wait for its model now.
    """
    if busy is None or waiting <= busy.queue or options != RequestOptions():
        return Choice(options.profile, options.profile, None)
    return Choice(None, busy.profile, f"{waiting} pictures waited, more than {busy.queue}, and quality was auto")
