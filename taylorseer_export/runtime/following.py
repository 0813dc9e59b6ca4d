"""Following: what ranks other than 0 do while rank 0 samples or serves.

    with tse.load("engines/flux-tiny") as denoiser:     # under torchrun, on every rank
        if not tse.follow(denoiser):                    # on others than rank 0: when rank 0 has closed its own
            ...                                         # rank 0: sample, serve; the others take part

Rank 0 sends each request whole; every rank cuts its own rows and runs the loop on them, scheduler and all, and the
latents are gathered at its end.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from taylorseer_export.bundle.manifest import Sections
from taylorseer_export.errors import ConfigError, RankError, StepError
from taylorseer_export.method import Forecasts, Guard, Plan
from taylorseer_export.runtime.adapter import Adapter
from taylorseer_export.runtime.branches import Branches
from taylorseer_export.runtime.denoiser import Denoiser
from taylorseer_export.runtime.driven import DrivenCourse
from taylorseer_export.runtime.group import Group
from taylorseer_export.runtime.joined import Joined
from taylorseer_export.runtime.lead import END, Lead, ready
from taylorseer_export.runtime.sampling import Beginning, Loop, Request, denoise
from taylorseer_export.runtime.sections import Course

_NUMBERS = ("guided", "guidance_scale", "height", "width", "previews", "ahead")


def follow(denoiser: Denoiser) -> bool:
    """Take part in what rank 0 samples until it closes its denoiser; on rank 0, lead from here on.

    Args:
        denoiser: Loaded by all ranks; each calls this once.

    Returns:
        Whether this rank has followed, and has nothing more to do. False on rank 0, which goes on, and on all ranks
        where a loop shares no rows out, as where each runs one branch of guidance.

    Raises:
        RankError: A rank has died, is late, or is elsewhere; named within the group's timeout.
    """
    share = denoiser.share.of_loop()
    if share.ranks == 1 or share.group is None:
        return False
    if share.rank == 0:
        share.lead = share.lead or Lead(share.group, encoded)
        return False
    follower = _Follower(denoiser, share.group)
    while (told := share.group.broadcast(b"")) != END:
        if told:
            follower.take_part(told)
    return True


class _Follower:
    """What a rank that follows keeps from one request to the next: its slots, and the LoRA that came last."""

    def __init__(self, denoiser: Denoiser, group: Group) -> None:
        self._denoiser, self._group = denoiser, group
        self._branches: Branches | None = None
        self._lora: Adapter | None = None

    def take_part(self, told: bytes) -> None:
        """Run one request with the others, in the slots of the last one where they fit."""
        try:
            with ready(self._group):
                loop, branches = self._begun(told)
        except RankError:
            raise
        except Exception:  # rank 0 has been told, and answers for it
            return
        try:
            for _ in denoise(loop, branches):
                pass
        except RankError:
            raise
        except StepError as error:
            if error.__cause__ is not None:  # an engine call that failed here alone: rank 0 goes on without this one
                raise
            # Given up, or of numbers that are not finite: on all ranks alike.

    def _begun(self, told: bytes) -> tuple[Loop, Branches]:
        request, forecasts = decoded(told, self._lora)
        self._lora = request.lora or self._lora
        loop = Loop(self._denoiser, request, forecasts)
        if self._branches is None or self._branches.sizes != [*map(self._denoiser.share.sizes, loop.branches)]:
            self._branches = None  # freed before others are allocated
            self._branches = loop.open(self._denoiser)
        loop.enter(self._branches)
        return loop, self._branches


def encoded(request: Request, forecasts: Forecasts, sent: Adapter | None = None) -> bytes:
    """A request as it is sent: an archive of numpy's, of arrays and one text.

    Args:
        request, forecasts: As for `sample`.
        sent: The LoRA that all ranks have; of one with its matrices only the strength is sent.

    Raises:
        ConfigError: It is of several sections that others drive, each of which is made with a decoder.
    """
    course = request.course
    if isinstance(course, DrivenCourse) and course.count > 1:
        raise ConfigError(
            "a video in sections that others drive is asked of several ranks, expected one; run it on one"
        )
    arrays: dict[str, np.ndarray] = {"latents": request.latents}
    arrays |= {f"conditioning/{name}": np.asarray(value) for name, value in request.conditioning.items()}
    arrays |= {f"negative/{name}": np.asarray(value) for name, value in (request.negative or {}).items()}
    facts: dict[str, Any] = {name: getattr(request, name) for name in _NUMBERS}
    facts["negative"] = request.negative is not None
    if request.sigmas is not None:
        arrays["sigmas"] = request.sigmas
    if isinstance(course, Course):  # of one section that others drive, the request itself has all that it is given
        arrays["course"] = course.picture
        facts["course"] = {name: getattr(course, name) for name in ("held", "window", "count")}
        facts["course"]["described"] = course.described.model_dump(mode="json")
    if (joined := request.joined) is not None:
        arrays["joined"], facts["joined"] = joined.value, {"axis": joined.axis, "ahead": joined.ahead}
    if (begins := request.beginning) is not None:
        arrays["beginning"] = begins.latents
        facts["beginning"] = {"strength": begins.strength, "steps": begins.steps}
    if (lora := request.lora) is not None:
        names = ("given", "layers", "unread", "strength")
        facts["lora"] = {name: getattr(lora, name) for name in names}
        if sent is None or sent.matrices is not lora.matrices:
            arrays |= {"lora/matrices": lora.matrices, "lora/ups": lora.ups}
    facts["forecasts"] = {
        "plan": str(forecasts.plan), "order": forecasts.order, "form": forecasts.form, "weights": forecasts.weights,
        "guard": None if forecasts.guard is None else asdict(forecasts.guard),
    }  # fmt: skip
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays, facts=np.array(json.dumps(facts)))
    return file.getvalue()


def decoded(told: bytes, kept: Adapter | None = None) -> tuple[Request, Forecasts]:
    """What `encoded` made an archive of; `kept` is the LoRA that came last."""
    with np.load(io.BytesIO(told), allow_pickle=False) as archive:
        arrays = dict(archive)
    facts = json.loads(str(arrays.pop("facts")))
    given, named = facts.pop("forecasts"), facts.pop("negative")
    guard = None if given["guard"] is None else Guard(**given["guard"])
    weights = given["weights"] and tuple(map(tuple, given["weights"]))
    forecasts = Forecasts(Plan(given["plan"]), given["order"], given["form"], weights, guard)
    joined = Joined(value=arrays["joined"], **facts.pop("joined")) if "joined" in facts else None
    begins = Beginning(arrays["beginning"], **facts.pop("beginning")) if "beginning" in facts else None
    lora = None
    if (one := facts.pop("lora", None)) is not None:
        if "lora/matrices" not in arrays:
            assert kept is not None, "bug in taylorseer-export: a LoRA that did not come is asked for"
            arrays |= {"lora/matrices": kept.matrices, "lora/ups": kept.ups}
        matrices, ups = arrays["lora/matrices"], arrays["lora/ups"]
        lora = Adapter(tuple(one["given"]), matrices, ups, one["layers"], tuple(one["unread"]), one["strength"])
    course = None
    if (one := facts.pop("course", None)) is not None:
        described = Sections.model_validate_json(json.dumps(one["described"]))
        course = Course(described, tuple(one["held"]), one["window"], one["count"], arrays["course"])
    request = Request(
        arrays["latents"],
        _under("conditioning", arrays),
        sigmas=arrays.get("sigmas"),
        negative=_under("negative", arrays) if named else None,
        joined=joined,
        beginning=begins,
        course=course,
        lora=lora,
        **facts,
    )
    return request, forecasts


def _under(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{prefix}/"): value for name, value in arrays.items() if name.startswith(f"{prefix}/")}
