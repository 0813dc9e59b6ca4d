"""Replicas of the images API under Ray Serve, on one machine or a cluster: each loads the bundles for itself.

    pip install 'ray[serve]' 'taylorseer-export[serve,onnxruntime]'
    serve run --app-dir tools/deploy ray_serve:application bundles=engines/flux-tiny replicas=2

Arguments: `bundles`, folders with commas between them, at the same place on every machine; `replicas` (1); `device`
(`cpu`), of which each replica is given one where it is `cuda`; `slots` (4), pictures of each that are drawn at once.
A request goes to the replica that has fewer. One that dies is started again, and what it was drawing is lost: clients
ask again, with the same seed for the same picture. Jobs under `/v1/videos` and the numbers of `/metrics` are each
replica's own, so videos want one replica; keys, limits and TLS are for what stands before Ray's port 8000.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def application(given: Mapping[str, str]) -> Any:
    """What `serve run` starts."""
    from ray import serve

    from taylorseer_export.bundle.device import Device
    from taylorseer_export.serve.service import Limits

    folders = [Path(folder).resolve() for folder in given["bundles"].split(",")]
    device, limits = Device.parse(given.get("device", "cpu")), Limits(slots=int(given.get("slots", "4")))

    def loaded() -> Any:
        """The app of one replica, made there."""
        from taylorseer_export.serve.api.app import app_of
        from taylorseer_export.serve.api.loaded import load_models

        return app_of(load_models(folders, device, limits=limits))

    deployed = serve.deployment(
        name="taylorseer",
        num_replicas=int(given.get("replicas", "1")),
        max_ongoing_requests=limits.slots + limits.queue,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(device.is_gpu)},
    )
    return deployed(serve.ingress(loaded)()).bind()
