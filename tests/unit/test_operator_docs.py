"""docs/operator.md names every metric of the operator, with its labels, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from baton_operator.metrics import Metrics

PAGE = Path(__file__).parents[2] / "docs" / "operator.md"


def test_the_page_lists_every_metric_with_its_labels() -> None:
    rows = re.findall(r"^\| `(baton_operator_\w+)` \|([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    documented = {name: tuple(label.strip() for label in labels.split(",") if label.strip()) for name, labels in rows}
    metrics = [value for value in vars(Metrics()).values() if hasattr(value, "_labelnames")]
    registered = {
        metric._name + ("_total" if metric._type == "counter" else ""): tuple(metric._labelnames) for metric in metrics
    }
    assert documented == registered
