"""Put the nodes into a ComfyUI: a link to this folder, or a copy of it, among its custom nodes."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from taylorseer_export.errors import ConfigError

NAME = "taylorseer-export"  # of the folder there
OLDEST = (0, 3, 64)  # of ComfyUI, which the nodes were run in
_OWN = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Installed:
    """What was done.

    Attributes:
        place: The nodes, in ComfyUI's folder.
        models: Where it looks for bundles.
        version: Of ComfyUI.
    """

    place: Path
    models: Path
    version: str


def install(comfyui: Path, copy: bool = False) -> Installed:
    """Link or copy the nodes; where they are linked already nothing changes.

    Args:
        comfyui: ComfyUI's folder, the one with `main.py`.
        copy: Whether the folder is copied, where no link can be made.

    Raises:
        ConfigError: It is no ComfyUI, or too old; or other nodes stand in the place.
    """
    version = _version(comfyui)
    if tuple(map(int, version.split(".")[:3])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(f"ComfyUI in {comfyui} is {version}, expected {oldest} or newer; update it")
    place, models = comfyui / "custom_nodes" / NAME, comfyui / "models" / "taylorseer"
    linked = place.is_symlink() and place.resolve() == _OWN and not copy
    if not linked:
        if place.exists() or place.is_symlink():
            raise ConfigError(f"{place} is there, expected nothing of that name; remove it, and run this again")
        if copy:
            shutil.copytree(_OWN, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            place.symlink_to(_OWN, target_is_directory=True)
    models.mkdir(parents=True, exist_ok=True)
    return Installed(place, models, version)


def _version(comfyui: Path) -> str:
    """Of the ComfyUI in a folder."""
    file = comfyui / "comfyui_version.py"
    parts = [comfyui / "main.py", comfyui / "custom_nodes", file]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise ConfigError(f"{comfyui} has no {missing[0]}, expected the folder of a ComfyUI; name it with --into")
    found = re.search(r"__version__ = \"([0-9]+\.[0-9]+\.[0-9]+)", file.read_text())
    if found is None:
        raise ConfigError(f"{file} says no version, expected one like 0.3.64; update ComfyUI")
    return found[1]
