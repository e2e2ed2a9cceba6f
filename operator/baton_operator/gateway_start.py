"""How the gateways of the serving revision are started, as the rollout's memory has it. Pure, standard library only.

While another revision is on trial the spec says how its own gateways would be started, and those may refuse the workers
that serve. Somebody who deletes the gateways meanwhile is to get the former ones back. Image and arguments are kept
and nothing else: a whole pod in a ConfigMap would let whoever may edit that mount any Secret of the namespace.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

from baton_operator.objects import Manifest

GATEWAY_FILE = "gateway.json"
_CONTAINER = "gateway"


@dataclass(frozen=True, slots=True)
class GatewayStart:
    """What differs between the gateways of two releases."""

    image: str
    args: tuple[str, ...]

    def text(self) -> str:
        return json.dumps({"image": self.image, "args": self.args})

    def put_into(self, gateways: Manifest) -> dict[str, Any]:
        """The Deployment with this image and these arguments; what fetches the model has the gateways' image, too."""
        template = gateways["spec"]["template"]
        pod, other = template["spec"], start_of(gateways).image

        def changed(container: Manifest) -> dict[str, Any]:
            image = self.image if container["image"] == other else container["image"]
            args = {"args": list(self.args)} if container["name"] == _CONTAINER else {}
            return {**container, "image": image, **args}

        containers = {
            group: [changed(container) for container in pod[group]]
            for group in ("initContainers", "containers")
            if group in pod
        }
        return {**gateways, "spec": {**gateways["spec"], "template": {**template, "spec": {**pod, **containers}}}}


def start_of(gateways: Manifest) -> GatewayStart:
    """Of a Deployment, ours or as it lives."""
    containers = cast("list[Manifest]", gateways["spec"]["template"]["spec"]["containers"])
    for container in containers:
        if container["name"] == _CONTAINER:
            return GatewayStart(str(container["image"]), tuple(map(str, container.get("args", ()))))
    return GatewayStart("", ())


def read_start(config_map: Manifest | None) -> GatewayStart | None:
    """What was kept; None where nothing was, or where somebody spoilt it."""
    data = cast("dict[str, str]", (config_map or {}).get("data") or {})
    try:
        kept: object = json.loads(data.get(GATEWAY_FILE) or "null")
    except ValueError:
        return None
    found = cast("dict[str, object]", kept) if isinstance(kept, dict) else {}
    image, args = found.get("image"), found.get("args")
    if not isinstance(image, str) or not isinstance(args, list):
        return None
    return GatewayStart(image, tuple(map(str, cast("list[object]", args))))
