"""Whether a live object still is what was applied. Pure, standard library only.

Two ways to differ: the manifest changed since it was applied (its digest is an annotation, so that a field that was
taken away counts), or somebody changed a field that the manifest states. Fields that it does not state are others'.
"""

from __future__ import annotations

import hashlib
import json
import re
from decimal import Decimal
from typing import Any, cast

from baton_operator.objects import HASH_ANNOTATION, Manifest

_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_FACTORS = {
    None: Decimal(1), "m": Decimal("0.001"), "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9),
    "T": Decimal(10**12), "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40),
}  # fmt: skip


def stamped(manifest: Manifest) -> dict[str, Any]:
    """The manifest with its own digest among its annotations."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]
    metadata = manifest["metadata"]
    annotations = {**metadata.get("annotations", {}), HASH_ANNOTATION: digest}
    return {**manifest, "metadata": {**metadata, "annotations": annotations}}


def differs(wanted: Manifest, live: Manifest) -> bool:
    """Whether `wanted` (stamped) has to be applied again."""
    return not _holds(live, wanted)


def _holds(live: Any, wanted: Any) -> bool:
    """Whether everything that `wanted` states is so in `live`."""
    if live == wanted:
        return True  # most of a manifest, most of the time
    if isinstance(wanted, dict):
        stated, found = cast("dict[str, Any]", wanted), cast("dict[str, Any]", live)
        return isinstance(live, dict) and all(key in found and _holds(found[key], stated[key]) for key in stated)
    if isinstance(wanted, list):
        return isinstance(live, list) and _holds_items(cast("list[Any]", live), cast("list[Any]", wanted))
    return _same_quantity(live, wanted)


def _holds_items(live: list[Any], wanted: list[Any]) -> bool:
    """Lists of values are equal or not; to lists of objects others may have added (a sidecar, a default toleration)."""
    return all(isinstance(item, dict) and any(_holds(found, item) for found in live) for item in wanted)


def _same_quantity(live: Any, wanted: Any) -> bool:
    """The API server writes `1000m` as `1`."""
    found, asked = _quantity(live), _quantity(wanted)
    return found is not None and found == asked


def _quantity(value: Any) -> Decimal | None:
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    return Decimal(match[1]) * _FACTORS[match[2]] if match else None
