"""Where engines run: a kind of device and, of several, which one.

A manifest lists kinds alone; which GPU of a machine it is, is a fact of the process that loads a bundle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from taylorseer_export.errors import ConfigError

DEVICES = "cpu, cuda or cuda:N"  # what may be asked for
_HIGHEST = 999  # no machine has more GPUs


@dataclass(frozen=True)
class Device:
    """A CPU or one GPU.

    Attributes:
        kind: `cpu` or `cuda`.
        index: Number of the GPU among those that the process sees, from 0; None leaves it to the library that runs
            the engines, and on the CPU.
    """

    kind: str = "cpu"
    index: int | None = None

    @classmethod
    def parse(cls, text: str | Device, name: str = "device") -> Device:
        """The device of `cpu`, `cuda` or `cuda:1`.

        Args:
            text: As people type it; a device is taken as it is.
            name: What it was given as, for the error.

        Raises:
            ConfigError: It is none of these.
        """
        if isinstance(text, Device):
            return text
        found = re.fullmatch(r"(cpu|cuda)|cuda:([0-9]{1,3})", text, re.ASCII)
        if found is None:
            raise ConfigError(
                f"{name} is {text[:64]}, expected {DEVICES} (number of a GPU, 0 to {_HIGHEST}); choose one of those"
            )
        return cls(found[1]) if found[1] else cls("cuda", int(found[2]))

    @property
    def is_gpu(self) -> bool:
        """Whether it has memory and an order of calls of its own."""
        return self.kind != "cpu"

    @property
    def number(self) -> int:
        """As ONNX Runtime numbers it: 0 where none was chosen."""
        return self.index or 0

    def at(self, index: int) -> Device:
        """With its number, `index` where none was chosen; the CPU has none."""
        return replace(self, index=index) if self.is_gpu and self.index is None else self

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"


CPU = Device()
