"""`baton plan`: the objects of a service and the steps of a rollout, without a cluster; `baton pull --link`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from baton.cli import app
from baton.local.errors import LocalError
from baton.local.model import ModelError, link_model
from baton_operator.desired import ALL_APIS, Platform, desire
from baton_operator.objects import Desired
from baton_operator.plan import Apply, Delete, Event, MakeSecret, Probe, Scale
from baton_operator.rehearsal import describe, rehearse
from baton_operator.resources import API_VERSION, parse_llm_service

HEAD = f"apiVersion: {API_VERSION}\nkind: LLMService\nmetadata: {{name: chat, namespace: ns}}\n"
OLD = "spec: {pools: {prefill: {replicas: 2}, decode: {replicas: 4}}}\n"
NEW = "spec: {pools: {prefill: {replicas: 2}, decode: {replicas: 4}}, engine: {blockSize: 32}}\n"


def write(folder: Path, name: str, spec: str) -> str:
    (folder / name).write_text(HEAD + spec)
    return str(folder / name)


def run(*options: str) -> str:
    result = CliRunner().invoke(app, ["plan", *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_a_plan_shows_revision_objects_and_steps(tmp_path: Path) -> None:
    said = run("--file", write(tmp_path, "chat.yaml", OLD))
    assert said.startswith("LLMService chat in namespace ns\n  revision ")
    assert "4 x baton-worker:latest (500m CPU, 2Gi memory)" in said
    steps = said[said.index("Steps") :]
    assert "1  make" in steps
    assert "one prompt through prefill and decode" in steps


@pytest.mark.parametrize("spec", ["spec: {}\n", "spec: {pools: {decode: {replicas: 2}}}\n"], ids=["none", "one"])
def test_a_plan_of_pools_without_stated_replicas_shows_what_seeds_them(tmp_path: Path, spec: str) -> None:
    said = run("--file", write(tmp_path, "chat.yaml", spec))
    assert "one prompt through prefill and decode" in said[said.index("Steps") :]


def test_a_plan_of_the_example_says_what_pools_that_state_no_replicas_begin_with() -> None:
    said = run("--file", str(Path(__file__).parents[2] / "examples" / "llmservice.yaml"))
    (num_objects,) = map(int, re.findall(r"^Objects \((\d+)\)", said, re.MULTILINE))
    steps = said[said.index("Steps") :]
    assert f"make {num_objects - 2 - 2} objects" in steps, "Secrets and worker Deployments have lines of their own"
    for role in ("prefill", "decode"):
        assert f"LLMPool/baton-{role}: 1 worker\n" in steps


def test_a_plan_from_one_service_to_another_shows_the_rollout(tmp_path: Path) -> None:
    said = run("--from", write(tmp_path, "old.yaml", OLD), "--file", write(tmp_path, "new.yaml", NEW))
    steps = said[said.index("Steps from revision ") :].splitlines()
    order = [
        next(number for number, line in enumerate(steps) if word in line)
        for word in ("is on trial beside", ": 4 workers", "probe revision", "requests go to", ": 0 workers", "delete ")
    ]
    assert order == sorted(order)


def test_a_plan_to_the_same_service_has_no_steps(tmp_path: Path) -> None:
    file = write(tmp_path, "chat.yaml", OLD)
    assert "none: nothing of the cluster changes" in run("--from", file, "--file", file)


def test_a_plan_as_yaml_is_what_a_cluster_would_hold(tmp_path: Path) -> None:
    manifests = list(yaml.safe_load_all(run("--file", write(tmp_path, "chat.yaml", OLD), "--output", "yaml")))
    (decode,) = (manifest for manifest in manifests if manifest["metadata"]["name"].startswith("chat-decode-"))
    assert decode["spec"]["replicas"] == 4
    assert all("ownerReferences" not in manifest["metadata"] for manifest in manifests)


def test_two_services_are_not_compared(tmp_path: Path) -> None:
    other = write(tmp_path, "other.yaml", OLD)
    (tmp_path / "other.yaml").write_text((tmp_path / "other.yaml").read_text().replace("chat", "talk"))
    with pytest.raises(LocalError, match=r"talk.* chat"):
        run("--from", other, "--file", write(tmp_path, "chat.yaml", NEW))


def test_an_output_of_another_form_is_refused() -> None:
    with pytest.raises(LocalError, match="use text or yaml"):
        run("--output", "xml")


@pytest.mark.parametrize("strategy", ["Surge", "Replace"])
def test_every_step_of_a_rehearsal_has_words(strategy: str) -> None:
    def desired(spec: str) -> Desired:
        document = yaml.safe_load(HEAD + spec)
        document["spec"]["rollout"] = {"strategy": strategy}
        service = parse_llm_service(document, where="test")
        return desire(service, Platform(apis=ALL_APIS), uid="", generation=1)

    passes = [*rehearse(None, desired(OLD)), *rehearse(desired(OLD), desired(NEW))]
    steps = [step for each in passes for step in each]
    assert {type(step) for step in steps} >= {Apply, MakeSecret, Scale, Delete, Probe, Event}
    assert all(describe(step) for step in steps)


# ---------------------------------------------------------------- links


def test_a_link_leads_to_a_folder_and_to_a_single_file_alike(tmp_path: Path) -> None:
    folder, file, link = tmp_path / "folder", tmp_path / "model.gguf", tmp_path / "below" / "link"
    folder.mkdir()
    file.write_text("weights")
    for _ in range(2):  # a container that is started again
        link_model(folder, link)
        assert link.resolve() == folder
        link_model(file, link)
        assert [inner.name for inner in link.iterdir()] == ["model.gguf"]
        assert (link / "model.gguf").read_text() == "weights"


def test_a_link_is_not_made_over_somebodys_files(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(ModelError, match="there is something else"):
        link_model(tmp_path, tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["notes"]
