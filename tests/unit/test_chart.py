"""The chart's generated parts are up to date, and its dashboards and alerts name only what exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from baton_operator import desired
from baton_operator.desired import Platform, desire
from baton_operator.resources import LLMService, parse_llm_service
from helm.dashboards import COMPONENT_LABEL, SERVICE_LABEL
from helm.values import Values

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "baton"
_NAME = re.compile(r"(?<![a-z_])(?:vllm:|baton_)[a-z0-9_]+")
_PLACE = re.compile(r"\{([^}]*)\}")
_GROUPING = re.compile(r"by \(([^)]*)\)")
# What Prometheus, a histogram and the operator's ServiceMonitor add to a series.
ADDED = {"le", "namespace", SERVICE_LABEL, COMPONENT_LABEL}


def test_the_generated_parts_of_the_chart_are_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/write_chart.py", "--check"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_values_yaml_is_the_model_with_nothing_stated() -> None:
    assert Values.model_validate(yaml.safe_load((CHART / "values.yaml").read_text())) == Values()


def test_the_example_for_artifact_hub_is_an_llmservice() -> None:
    annotations = yaml.safe_load((CHART / "Chart.yaml").read_text())["annotations"]
    (example,) = yaml.safe_load(annotations["artifacthub.io/crdsExamples"])
    parse_llm_service(example, where="Chart.yaml")
    names = [crd["name"] for crd in yaml.safe_load(annotations["artifacthub.io/crds"])]
    assert names == ["llmservices.serving.baton.dev", "llmpools.serving.baton.dev"]


# ---------------------------------------------------------------- dashboards and alerts


def known_metrics() -> dict[str, set[str]]:
    """Name -> labels, as docs/metrics.md lists them: made from the code and compared with live processes elsewhere."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        if line.startswith(("| `vllm:", "| `baton_")):
            name, _, labels = (cell.strip() for cell in line.strip("|").split("|")[:3])
            found.setdefault(name.strip("`"), set()).update(re.findall(r"`(\w+)`", labels))
    return found


def queries() -> Iterator[tuple[str, str]]:
    for path in sorted((CHART / "dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            yield from ((f"{path.stem}: {panel['title']}", target["expr"]) for target in panel["targets"])
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                yield f"{path.stem}: ${variable['name']}", variable["query"]["query"]
    rules = (
        (CHART / "templates" / "prometheusrule.yaml").read_text().replace("{{ $of }}", f"namespace, {SERVICE_LABEL}")
    )
    for name, rule in re.findall(r"alert: (\w+)\n(.*?)(?:\n +for:|\n +labels:)", rules, re.DOTALL):
        yield f"alert {name}", re.sub(r"\{\{[^}]*\}\}", "1", rule)


def mistakes(query: str, known: dict[str, set[str]]) -> Iterator[str]:
    series = {re.sub(r"_(bucket|sum|count)$", "", name) if name not in known else name for name in _NAME.findall(query)}
    series -= {SERVICE_LABEL}
    if not series:
        yield "no series of ours"
    yield from (f"no metric {name}" for name in series if name not in known)
    matched = {match.split("=")[0].rstrip("!~ ") for place in _PLACE.findall(query) for match in _matches(place)}
    grouped = {label.strip() for labels in _GROUPING.findall(query) for label in labels.split(",")}
    labels = ADDED.union(*(known.get(name, set()) for name in series))
    yield from (f"no label {label} on {sorted(series)}" for label in (matched | grouped) - labels)


def _matches(place: str) -> list[str]:
    return re.findall(r'(\w+(?:=~|!~|!=|=))"', place)


@pytest.mark.parametrize(("where", "query"), list(queries()))
def test_a_query_names_metrics_and_labels_that_exist(where: str, query: str) -> None:
    assert list(mistakes(query, known_metrics())) == [], query


def test_the_check_of_queries_sees_a_wrong_metric_and_a_wrong_label() -> None:
    known = {"baton_x_total": {"reason"}}
    assert list(mistakes('rate(baton_y_total{reason="a"}[5m])', known))
    assert list(mistakes('rate(baton_x_total{cause="a"}[5m])', known))
    assert list(mistakes("sum by (cause) (baton_x_total)", known))
    assert not list(mistakes('sum by (reason) (rate(baton_x_total{reason=~"a|b"}[5m]))', known))


def test_alerts_have_a_severity_and_words_for_people() -> None:
    text = (CHART / "templates" / "prometheusrule.yaml").read_text()
    alerts = re.split(r"- alert: ", text)[1:]
    assert len(alerts) >= 8
    for alert in alerts:
        assert "severity:" in alert
        assert "summary:" in alert
        assert "description:" in alert


def test_series_of_a_service_carry_the_labels_that_dashboards_ask_for() -> None:
    platform = Platform("g", "w", "c", "r", "ops", frozenset({desired.SERVICE_MONITOR}))
    found = desire(LLMService(), platform, uid="u", generation=1)
    (monitor,) = (manifest for manifest in found.after if manifest["kind"] == "ServiceMonitor")
    copied: list[str] = monitor["spec"]["targetLabels"]
    assert {re.sub(r"[^a-zA-Z0-9]", "_", label) for label in copied} == {SERVICE_LABEL, COMPONENT_LABEL}
