"""Why a pod that should run does not, in words that stay the same while it does not. Pure, standard library only.

A Deployment only counts its pods; the image that cannot be pulled and the node that has no room are told by the pod.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import cast

from baton_operator.objects import COMPONENT_LABEL, REVISION_LABEL, Manifest, Trouble, Where

_BACK_OFF = re.compile(r'Back-off pulling image "[^"]*"(: )?(ErrImagePull: )?')
_PULLING = ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "RegistryUnavailable")
_STARTING = ("ContainerCreating", "PodInitializing")
_MOST_WORDS = 300  # of a reason: a condition holds 1,024 characters, with those of both pools


def troubles_of(pods: Iterable[Manifest]) -> dict[Where, Trouble]:
    """The trouble of the first pod that has one, by revision and component."""
    found: dict[Where, Trouble] = {}
    for pod in sorted(pods, key=lambda pod: pod["metadata"]["name"]):
        metadata = pod["metadata"]
        labels = _map(metadata, "labels")
        where = labels.get(REVISION_LABEL, ""), labels.get(COMPONENT_LABEL, "")
        if where in found or metadata.get("deletionTimestamp"):
            continue
        if (trouble := _trouble(pod)) is not None:
            found[where] = trouble
    return found


def _trouble(pod: Manifest) -> Trouble | None:
    name, status = str(pod["metadata"]["name"]), cast("Manifest", pod.get("status") or {})
    for condition in cast("list[Manifest]", status.get("conditions") or []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return Trouble(name, str(condition.get("reason") or "Unschedulable"), _short(condition.get("message")))
    return next((Trouble(name, *said) for container in _containers(status) if (said := _said(container))), None)


def _containers(status: Manifest) -> Iterator[Manifest]:
    for key in ("initContainerStatuses", "containerStatuses"):
        yield from cast("list[Manifest]", status.get(key) or [])


def _said(container: Manifest) -> tuple[str, str] | None:
    """Reason and words. kubelet's own change with every try (back-off 10s, 20s ...): these do not."""
    state, last = _map(container, "state"), _map(container, "lastState")
    waiting, ended = _map(state, "waiting"), _map(state, "terminated") or _map(last, "terminated")
    reason = str(waiting.get("reason") or "")
    if reason in _PULLING:
        detail = _short(_BACK_OFF.sub("", str(waiting.get("message") or "")))
        words = f"the image {container.get('image')} cannot be pulled"
        return ("InvalidImageName" if reason == "InvalidImageName" else "ImagePullBackOff"), _joined(words, detail)
    if ended and ended.get("exitCode") and not container.get("ready"):
        how = "was killed: out of memory" if ended.get("reason") == "OOMKilled" else f"ended with {ended['exitCode']}"
        words = f"container {container['name']} {how} and is started again and again"
        return "CrashLoopBackOff", _joined(words, _last_line(ended.get("message")))
    if reason and reason not in _STARTING:
        return reason, _short(waiting.get("message")) or f"container {container['name']} cannot be started"
    return None


def _map(of: Manifest, key: str) -> Manifest:
    return cast("Manifest", of.get(key) or {})


def _joined(words: str, detail: str) -> str:
    return f"{words}: {detail}" if detail else words


def _last_line(message: object) -> str:
    """Of the log that the container left as its last words."""
    lines = str(message or "").strip().splitlines()
    return _short(lines[-1]) if lines else ""


def _short(message: object) -> str:
    words = " ".join(str(message or "").split())
    return words if len(words) <= _MOST_WORDS else f"{words[:_MOST_WORDS]}…"
