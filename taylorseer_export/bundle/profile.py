"""Profiles: calibrated plans and forecast weights of a bundle, one sealed file each under `profiles/`.

A profile is data about a model, not about its engines: it names the model's weights and the granularity it was measured
at, and serves every bundle of both, whatever engine it was built for. Adding one changes no other file of the bundle.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from taylorseer_export.bundle.atomic import check_open, replacing
from taylorseer_export.bundle.manifest import Manifest
from taylorseer_export.bundle.sealed import Part, Sealed, Sha256, content
from taylorseer_export.bundle.store import Bundle
from taylorseer_export.errors import BundleError, ConfigError
from taylorseer_export.method import Granularity, Plan, Rule, Weights, check_weights
from taylorseer_export.method.weights import check_order

PROFILES = "profiles"


class Evidence(Part):
    """How far the latents of a way to sample are from those of all-full, over the samples named by the field."""

    fitted: float = Field(description="Mean PSNR of the latents of the samples that were fitted to, in dB.")
    held_out: float = Field(description="The same of the samples that took no part in the fit, in dB.")


class Profile(Sealed):
    """A plan with the weights of its forecast steps, and what they rest on."""

    model_config = ConfigDict(title="taylorseer-export profile")
    KIND: ClassVar[str] = "a profile"
    REMEDY: ClassVar[str] = "calibrate again with `taylorseer-export calibrate BUNDLE --name ...`"

    tool_version: str = Field(description="Version of taylorseer-export that wrote it.")
    name: str = Field(description="Name of the profile, and of its file.")
    family: str = Field(description="Model family it was measured on.")
    weights_sha256: Sha256 = Field(description="SHA-256 of the weights of that model, hexadecimal.")
    granularity: Granularity = Field(description="What is forecast.")
    order: int = Field(ge=0, le=4, description="Snapshots of a forecast less one.")
    plan: str = Field(description="F for a full step, . for a forecast step.")
    weights: Weights = Field(
        description="Per step the weights of the history, oldest first; none on a full step. They sum to 1."
    )
    thresholds: dict[Rule, float] = Field(description="Threshold of each guard that gives as many full steps.")
    samples: int = Field(ge=1, description="Samples that were fitted to.")
    held_out: int = Field(ge=1, description="Samples that took no part in the fit.")
    calibrated: Evidence = Field(description="This profile.")
    regular: Evidence = Field(description="The regular plan of as many full steps, forecast by the paper's weights.")
    fewer_steps: Evidence = Field(description="A loop of as many steps as the plan has full steps, all full.")
    margins: dict[str, float] = Field(
        default={},
        description="Full steps -> PSNR of held-out samples with the best plan found of as many, less that of a loop "
        "of as many steps, all full, in dB. Of a loop of few steps every number below its length, else the plan's own.",
    )

    @model_serializer(mode="wrap")
    def _without_nothing(self, rest: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A profile without margins is written as it was before there were any."""
        fields: dict[str, Any] = rest(self)
        return fields if self.margins else {name: value for name, value in fields.items() if name != "margins"}

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        plan = Plan.parse(self.plan)
        lengths = [0 if plan.is_full(s) else len(plan.history(s, self.order)) for s in range(len(plan))]
        if [len(w) for w in self.weights] != lengths:
            raise ValueError("weights do not have one entry per snapshot of each forecast step")
        check_weights(plan, self.order, self.weights)
        return self

    def check_fits(self, manifest: Manifest) -> None:
        """Refuse another model, granularity, or a higher order.

        Raises:
            BundleError: It was measured on another model or granularity, or needs more snapshots than are kept.
        """
        state, model = manifest.state, manifest.model
        measured = (self.family, self.weights_sha256[:12], self.granularity)
        expected = (manifest.family, model.weights_sha256[:12], state.granularity)
        if measured != expected or self.weights_sha256 != model.weights_sha256:
            raise BundleError(
                f"profile `{self.name}` is of {' '.join(measured)} (family, weights, granularity), expected "
                f"{' '.join(expected)}; {self.REMEDY}"
            )
        if self.order > state.order:
            raise BundleError(
                f"profile `{self.name}` is of order {self.order}, expected at most {state.order}, which the bundle's "
                f"buffers hold; {self.REMEDY}"
            )


def check_name(name: str) -> None:
    """Refuse a name that is not one plain file name, with a `ConfigError`."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise ConfigError(
            f"--name is {name!r}, expected lower-case letters, digits, `-` and `_`; choose a name such as fast"
        )


def profile_names(bundle: Bundle) -> list[str]:
    """The profiles of a bundle, sorted."""
    return sorted(path.stem for path in (bundle.folder / PROFILES).glob("*.json"))


def read_profile(bundle: Bundle, name: str) -> Profile:
    """The profile called `name`, checked byte by byte and against the bundle.

    Raises:
        ConfigError: The bundle has no such profile.
        BundleError: It is damaged, or of another model.
    """
    names = profile_names(bundle)
    if name not in names:
        raise ConfigError(
            f"profile is `{name}`, expected one of this bundle ({', '.join(names) or 'it has none'}); make it with "
            f"`taylorseer-export calibrate {bundle.folder} --full-steps N --name {name}`"
        )
    path = bundle.folder / PROFILES / f"{name}.json"
    profile = Profile.from_bytes(content(path, f"{Profile.KIND}; {Profile.REMEDY}"), path)
    if profile.name != name:
        raise BundleError(f"{path} is profile `{profile.name}`, expected `{name}`; {Profile.REMEDY}")
    profile.check_fits(bundle.manifest)
    return profile


class Profiles(Mapping[str, Profile]):
    """The profiles of a bundle by name, each read and checked when it is looked at; none without a bundle on disk."""

    def __init__(self, bundle: Bundle | None) -> None:
        self._bundle = bundle

    def __getitem__(self, name: str) -> Profile:
        if self._bundle is None or name not in self:
            raise KeyError(name)
        return read_profile(self._bundle, name)

    def __contains__(self, name: object) -> bool:
        return any(name == other for other in self)

    def __iter__(self) -> Iterator[str]:
        return iter(profile_names(self._bundle) if self._bundle else ())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def check_place_of_profile(bundle: Bundle, name: str) -> None:
    """Refuse a profile that could not be written, before the work of finding it.

    Raises:
        ConfigError: Its name is no file name, or the folder of the bundle is closed, as a hub's cache may be.
    """
    check_name(name)
    folder = bundle.folder / PROFILES
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is no folder, expected one for profile `{name}`; remove it")
    check_open(folder if folder.exists() else bundle.folder, f"profile `{name}`", "copy the bundle first")


def write_profile(bundle: Bundle, profile: Profile) -> Path:
    """Add a profile to a bundle, or replace it, whole or not at all."""
    check_name(profile.name)
    check_order(profile.order)
    folder = bundle.folder / PROFILES
    folder.mkdir(exist_ok=True)
    path = folder / f"{profile.name}.json"
    with replacing(path) as partial:
        partial.write_bytes(profile.to_json())
    return path
