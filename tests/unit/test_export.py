"""`baton export`: what was written for one machine, said to a cluster."""

from __future__ import annotations

from pathlib import Path

import yaml
from typer.testing import CliRunner

from baton.cli import app
from baton_operator.resources import parse_llm_service
from helm.values import Values

ROOT = Path(__file__).parents[2]
WRITTEN = """
apiVersion: serving.baton.dev/v1alpha1
kind: LLMService
metadata: {name: chat, namespace: team, labels: {owner: me}}
spec:
  pools:
    decode: {replicas: 2, kvMemory: 512Mi}
  gateway: {port: 9000}
  engine: {dtype: bfloat16}
"""


def export(tmp_path: Path, *options: str) -> tuple[str, str]:
    file = tmp_path / "chat.yaml"
    file.write_text(WRITTEN)
    result = CliRunner().invoke(app, ["export", "--file", str(file), *options])
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_export_keeps_what_was_written_and_names_what_a_cluster_does_not_read(tmp_path: Path) -> None:
    text, said = export(tmp_path)
    manifest = yaml.safe_load(text)
    assert manifest["metadata"] == {"name": "chat", "namespace": "team", "labels": {"owner": "me"}}
    assert manifest["spec"] == {
        "pools": {"decode": {"replicas": 2, "kvMemory": "512Mi"}}, "engine": {"dtype": "bfloat16"},
    }  # fmt: skip
    assert "left out spec.gateway.port" in said
    parse_llm_service(manifest, where="export")


def test_exported_values_are_ones_that_the_chart_takes(tmp_path: Path) -> None:
    text, _ = export(tmp_path, "--helm")
    values = Values.model_validate(yaml.safe_load(text))
    assert values.services["chat"].pools.decode.replicas == 2
    assert "helm upgrade baton helm/baton --namespace team" in text


def test_the_default_service_and_the_example_export_too(tmp_path: Path) -> None:
    for arguments in (["export", "--helm"], ["export", "--helm", "-f", str(ROOT / "examples" / "llmservice.yaml")]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        Values.model_validate(yaml.safe_load(result.stdout))


def test_a_wrong_file_is_refused_as_baton_up_refuses_it(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(WRITTEN.replace("decode:", "decoder:"))
    result = CliRunner().invoke(app, ["export", "-f", str(tmp_path / "wrong.yaml")])
    assert result.exit_code != 0
