"""Write the generated parts of helm/baton, so that they cannot rot.

    python scripts/write_chart.py           writes them
    python scripts/write_chart.py --check   exits with 1 if they are not up to date (a test runs this)

values.yaml, values.schema.json and the table of README.md come from helm/values.py; the CRD templates from
`baton_operator.crd`, the rules of its role from `baton_operator.kinds`; the dashboards from helm/dashboards.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "operator")]

from baton_operator.crd import llmpool_crd, llmservice_crd  # noqa: E402  (the path is set above)
from baton_operator.kinds import KINDS, rules  # noqa: E402
from helm.dashboards import dashboards  # noqa: E402
from helm.values import Values  # noqa: E402

CHART = ROOT / "helm" / "baton"
_TABLE = re.compile(r"(<!-- table: values -->\n).*?(<!-- end -->)", re.DOTALL)
_HEAD = "# Made by scripts/write_chart.py from {source}; change it there.\n"


def main() -> int:
    stale = [path for path, content in generated() if not path.exists() or path.read_text() != content]
    if "--check" in sys.argv:
        if stale:
            print(f"not up to date: {', '.join(p.name for p in stale)}; run `python scripts/write_chart.py`")
        return bool(stale)
    for path, content in generated():
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    return 0


def generated() -> Iterator[tuple[Path, str]]:
    yield CHART / "values.yaml", values_yaml()
    yield CHART / "values.schema.json", json.dumps(schema(), indent=1) + "\n"
    readme = CHART / "README.md"
    yield readme, _TABLE.sub(lambda found: found[1] + values_table() + found[2], readme.read_text())
    for crd in (llmservice_crd(), llmpool_crd()):
        yield CHART / "templates" / "crds" / f"{crd['spec']['names']['plural']}.yaml", crd_template(crd)
    yield CHART / "templates" / "_rules.tpl", rules_template()
    for name, dashboard in dashboards().items():
        yield CHART / "dashboards" / f"{name}.json", json.dumps(dashboard, indent=1) + "\n"


# ---------------------------------------------------------------- values


def schema() -> dict[str, Any]:
    made = Values.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_tidied(made)}


def _tidied(node: Any) -> Any:
    """Without defaults, which Helm takes from values.yaml, and without class names as titles."""
    if isinstance(node, list):
        return [_tidied(inner) for inner in node]
    if not isinstance(node, dict):
        return node
    dropped = {key for key in ("default", "title") if key in node and not _is_schema(node[key])}
    closed = {"additionalProperties": False} if "patternProperties" in node else {}  # pydantic leaves it open
    return {key: _tidied(value) for key, value in node.items() if key not in dropped} | closed


def _is_schema(value: Any) -> bool:
    """A property that is called `default` or `title`."""
    return isinstance(value, dict) and ("type" in value or "$ref" in value)


def values_yaml() -> str:
    lines = [_HEAD.format(source="helm/values.py"), *_yaml_lines(Values(), "")]
    return "".join(lines)


def _yaml_lines(part: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(part).model_fields.items():
        key, value = field.alias or name, getattr(part, name)
        if not indent:
            yield "\n"
        yield f"{indent}# -- {field.description}\n"
        if isinstance(value, BaseModel):
            yield f"{indent}{key}:\n"
            yield from _yaml_lines(value, indent + "  ")
        else:
            flow = None if isinstance(value, dict | list) else False
            text = yaml.safe_dump({key: value}, default_flow_style=flow, sort_keys=False, width=110)
            yield "".join(f"{indent}{line}\n" for line in text.splitlines())


def values_table() -> str:
    rows = [("Value", "Default", "Meaning"), ("---", "---", "---"), *_table_rows(Values(), "")]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)


def _table_rows(part: BaseModel, path: str) -> Iterator[tuple[str, str, str]]:
    for name, field in type(part).model_fields.items():
        key, value = f"{path}{field.alias or name}", getattr(part, name)
        if isinstance(value, BaseModel):
            yield from _table_rows(value, f"{key}.")
        else:
            yield f"`{key}`", f"`{json.dumps(value)}`", field.description or ""


# ---------------------------------------------------------------- custom resources


def crd_template(crd: dict[str, Any]) -> str:
    """A CRD as a template, so that an upgrade upgrades it; Helm never touches what lies in crds/."""
    text = yaml.dump(crd, Dumper=_PlainDumper, sort_keys=False, width=120, allow_unicode=True)
    assert "{{" not in text, "a description looks like a template"
    name = f"  name: {crd['metadata']['name']}\n"
    keep = "  {{- if .Values.crds.keep }}\n  annotations:\n    helm.sh/resource-policy: keep\n  {{- end }}\n"
    labels = '  labels:\n    {{- include "baton.labels" . | nindent 4 }}\n'
    assert text.count(name) == 1
    body = text.replace(name, name + keep + labels)
    head = _HEAD.format(source="operator/baton_operator/crd.py")
    return head + "{{- if .Values.crds.enabled }}\n" + body + "{{- end }}\n"


def rules_template() -> str:
    """What the operator may do, each kind with its reason."""
    lines = ["{{/* Made by scripts/write_chart.py from operator/baton_operator/kinds.py; change it there. */}}\n"]
    lines.append('{{- define "baton.rules" -}}\n')
    for kind in KINDS:
        lines.append(f"# {kind.why}\n")
        lines.append(yaml.dump(rules([kind]), Dumper=_PlainDumper, sort_keys=False, default_flow_style=None, width=120))
    return "".join([*lines, "{{- end }}\n"])


class _PlainDumper(yaml.SafeDumper):
    """Writes what occurs twice twice: anchors are for machines."""

    def ignore_aliases(self, data: object) -> bool:
        return True


if __name__ == "__main__":
    sys.exit(main())
