"""What the NVIDIA driver says of this machine, asked without torch: the CUDA it serves, and how many GPUs there are."""

from __future__ import annotations

import ctypes
import sys

from taylorseer_export.bundle.device import Device
from taylorseer_export.errors import ConfigError


def driver_cuda() -> int:
    """Major release of CUDA that the installed driver serves; 0 without a driver."""
    driver, found = _driver(), ctypes.c_int(0)
    if driver is not None:
        driver.cuDriverGetVersion(ctypes.byref(found))
    return found.value // 1000


def gpu_count() -> int:
    """GPUs that this process sees, after `CUDA_VISIBLE_DEVICES`; 0 without a driver."""
    driver, found = _driver(), ctypes.c_int(0)
    if driver is not None and driver.cuInit(0) == 0:
        driver.cuDeviceGetCount(ctypes.byref(found))
    return found.value


def check_number(device: Device) -> None:
    """Refuse a GPU by a number that there is not; one without a number is the libraries' own to find.

    Raises:
        ConfigError: Says how many there are.
    """
    if device.index is None or device.index < (count := gpu_count()):
        return
    names = ", ".join(str(Device(device.kind, k)) for k in range(count))
    raise ConfigError(
        f"device is `{device}`, expected a GPU that is here: this process sees {count} GPU{'s' * (count != 1)}"
        f"{f' ({names})' * bool(count)}; choose another, or check the driver and CUDA_VISIBLE_DEVICES"
    )


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
