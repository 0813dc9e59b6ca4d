"""What a server of the images API lets requests do, and who may send them."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from dataclasses import dataclass
from pathlib import Path

from taylorseer_export.errors import ConfigError

KEYS = "TAYLORSEER_API_KEYS"  # the variable with keys, separated by commas or spaces
OPEN = ("/", "/health")  # need no key: a page without data, and a probe


@dataclass(frozen=True)
class Settings:
    """Limits of requests, and keys.

    Attributes:
        timeout: Most seconds from the arrival of a request to the end of its pictures.
        most_pictures: That one request may ask for.
        body: Most bytes of a JSON body.
        form: Most bytes of a form.
        stall: Seconds that one turn of work may take before the server calls itself ill.
        keys: SHA-256 of the keys that open the API; without any it is open to all.
    """

    timeout: float = 600.0
    most_pictures: int = 10
    body: int = 1 << 20
    form: int = 64 << 20
    stall: float = 300.0
    keys: tuple[bytes, ...] = ()

    def until(self, began: float, timeout: float | None) -> float:
        """When a request that began then is given up, by the same clock: after its own time, or the most there is."""
        return began + (self.timeout if timeout is None else timeout)

    def allows(self, authorization: str) -> bool:
        """Whether an `Authorization` header has a key of these; takes as long for a wrong one as for a right one."""
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        found = [hmac.compare_digest(digest, known) for known in self.keys]  # all of them, whichever it is
        return not self.keys or (scheme.lower() == "bearer" and any(found))


def read_keys(file: Path | None) -> tuple[bytes, ...]:
    """SHA-256 of the keys of a file, one per line, and of those of the environment.

    Raises:
        ConfigError: The file is not readable or has no key, or a key is not 8 or more characters that can be typed.
    """
    keys: list[str] = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "no text"
            raise ConfigError(
                f"--api-key-file {file} is not readable ({why}), expected a key per line; mend it"
            ) from error
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise ConfigError(f"--api-key-file {file} is empty, expected a key per line; write one, or leave it out")
    keys += [key for key in re.split(r"[,\s]+", os.environ.get(KEYS, "")) if key]
    for number, key in enumerate(keys, 1):
        if not re.fullmatch(r"[!-~]{8,512}", key):  # which one is not told: it may be in a log
            raise ConfigError(
                f"API key {number} of {len(keys)} is {len(key)} characters, expected 8 to 512 of ASCII without spaces; "
                "choose another"
            )
    return tuple(_digest(key) for key in keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
