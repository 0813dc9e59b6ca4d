"""Which GPU builds: engines are made on torch's current one, and hold nothing of its number."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from taylorseer_export.bundle.device import Device
from taylorseer_export.bundle.driver import check_number


def building_on(device: Device | None) -> AbstractContextManager[object]:
    """Makes a GPU that was chosen by its number torch's current one, and the one before again at the end.

    Raises:
        ConfigError: There is no GPU of that number.
    """
    if device is None or device.index is None:
        return nullcontext()
    check_number(device)
    # Without a GPU that torch can use, the kinds of engines that need one say so themselves.
    return torch.cuda.device(device.index) if torch.cuda.is_available() else nullcontext()
