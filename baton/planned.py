"""`baton plan`: what the operator would make of a service on a cluster, and the steps from one service to another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml

from baton.local.errors import LocalError
from baton.local.service_file import Overrides, load_service
from baton_operator.desired import ALL_APIS, Platform, desire
from baton_operator.objects import REVISION_LABEL, SEED_MANAGER, Desired, Manifest
from baton_operator.plan import Apply, Step
from baton_operator.rehearsal import describe, rehearse


class PlanFileError(LocalError):
    """The two files cannot be compared, or the output has no such form."""


def show_plan(file: Path | None, before: Path | None, output: str) -> None:
    """Print the plan for `file`, from `before` if that is given. Raises: LocalError."""
    if output not in ("text", "yaml"):
        raise PlanFileError(f"--output {output}: use text or yaml")
    after = _desire(file)
    if output == "yaml":
        typer.echo(yaml.safe_dump_all([_portable(manifest) for manifest in _objects(after)], sort_keys=False), nl=False)
        return
    earlier = None if before is None else _desire(before)
    if earlier is not None and earlier.name != after.name:
        raise PlanFileError(f"--from {before} is service {earlier.name}, --file is {after.name}; they must be the same")
    for line in [*_head(after), *_object_lines(after), *_step_lines(earlier, after)]:
        typer.echo(line)


def _desire(file: Path | None) -> Desired:
    """With every optional API, and the images that the operator takes where a service names none."""
    return desire(load_service(file, Overrides()), Platform(apis=ALL_APIS), uid="", generation=1)


def _head(desired: Desired) -> Iterator[str]:
    yield f"LLMService {desired.name} in namespace {desired.namespace}"
    yield f"  revision {desired.revision}, model {desired.model}, API {desired.url}"
    for warning in desired.warnings:
        yield f"  note: {warning}"
    yield ""


def _objects(desired: Desired) -> list[Manifest]:
    """With the replicas that they begin with."""
    seeds = {pool.deployment["metadata"]["name"]: pool.seed for pool in desired.pools.values()}
    secrets = [secret.manifest for secret in desired.secrets]
    return [
        {**manifest, "spec": {**manifest["spec"], "replicas": seeds[manifest["metadata"]["name"]]}}
        if manifest["kind"] == "Deployment" and manifest["metadata"]["name"] in seeds
        else manifest
        for manifest in (*secrets, *desired.manifests)
    ]


def _portable(manifest: Manifest) -> dict[str, Any]:
    """Without the owner, whose uid only a cluster knows."""
    metadata = {key: value for key, value in manifest["metadata"].items() if key != "ownerReferences"}
    return {**manifest, "metadata": metadata}


def _object_lines(desired: Desired) -> Iterator[str]:
    manifests = _objects(desired)
    yield f"Objects ({len(manifests)})"
    width = max(len(manifest["kind"]) for manifest in manifests)
    names = max(len(manifest["metadata"]["name"]) for manifest in manifests)
    for manifest in manifests:
        yield f"  {manifest['kind']:<{width}}  {manifest['metadata']['name']:<{names}}  {_gist(manifest)}".rstrip()
    yield ""


def _gist(manifest: Manifest) -> str:
    """What one wants to know of an object."""
    spec = manifest.get("spec", {})
    match manifest["kind"]:
        case "Deployment":
            (container,) = spec["template"]["spec"]["containers"]
            limits = container["resources"]["limits"]
            cpu = container["resources"]["requests"]["cpu"]
            sizes = [f"{cpu} CPU", *(f"{amount} {name}" for name, amount in limits.items() if name != "cpu")]
            return f"{spec['replicas']} x {container['image']} ({', '.join(sizes)})"
        case "Service":
            ports = ", ".join(str(port["port"]) for port in spec["ports"])
            return f"{'headless' if spec.get('clusterIP') == 'None' else spec.get('type', 'ClusterIP')}, port {ports}"
        case "HTTPRoute" | "Ingress" | "InferencePool" | "ServiceMonitor":
            return "where the cluster has the API"
        case _:
            return ""


def _step_lines(before: Desired | None, after: Desired) -> Iterator[str]:
    passes = rehearse(before, after)
    yield "Steps" if before is None else f"Steps from revision {before.revision} to {after.revision}"
    if not passes:
        yield "  none: nothing of the cluster changes"
    for number, steps in enumerate(passes, 1):
        for index, line in enumerate(_pass_lines(steps)):
            yield f"  {number if not index else '':>2}  {line}"


def _pass_lines(steps: tuple[Step, ...]) -> Iterator[str]:
    """What is made all at once is counted, not listed again."""
    made = [step for step in steps if isinstance(step, Apply) and step.is_new and not _says_how_many(step)]
    if len(made) > 3:
        yield f"make {len(made)} objects"
    for step in steps:
        if len(made) <= 3 or step not in made:
            yield describe(step)


def _says_how_many(step: Apply) -> bool:
    """Of workers, or what a pool begins with."""
    return step.manager == SEED_MANAGER or REVISION_LABEL in step.manifest["metadata"]["labels"]
