"""The `baton` command: up, ps, scale, logs, down, pull, plan, export, doctor, version.

Each command imports what it needs when it runs, so that `baton --help` answers at once. Errors are one message and an
exit code (1: it failed, 2: it was asked wrongly), never a stack trace.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="baton",
    help="Disaggregated LLM serving. Start here: `baton up`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # importing rich would double the time of --help
    pretty_exceptions_enable=False,
)

FileOption = Annotated[
    Path | None,
    typer.Option("--file", "-f", help="LLMService YAML; default: SmolLM2 on this machine", show_default=False),
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", help="the service's metadata.name; needed only when several are up", show_default=False),
]


class DeviceName(StrEnum):
    """What `baton up --device` takes."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class KernelsName(StrEnum):
    """What `baton up --kernels` takes."""

    AUTO = "auto"
    NATIVE = "native"
    TRITON = "triton"
    REFERENCE = "reference"


@app.command()
def up(
    file: FileOption = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="the gateway's port", show_default=False)] = None,
    device: Annotated[
        DeviceName | None, typer.Option(help="where workers keep weights and KV", show_default=False)
    ] = None,
    kernels: Annotated[
        KernelsName | None,
        typer.Option(help="who computes; triton on the cpu is interpreted: a proof, not for speed", show_default=False),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="return once the service answers")] = False,
) -> None:
    """Start gateway, prefill and decode workers; Ctrl-C stops them."""
    from baton.local.service_file import Overrides
    from baton.local.up import start_detached, start_in_foreground

    (start_detached if detach else start_in_foreground)(file, Overrides(port, device, kernels))


@app.command()
def ps(
    name: NameOption = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show the processes: state, restarts, share of the machine."""
    from baton.local.commands import show_processes

    show_processes(name, as_json=json)


@app.command()
def scale(
    pool: Annotated[str, typer.Argument(help="prefill or decode")],
    replicas: Annotated[int, typer.Argument(help="how many workers it should have")],
    name: NameOption = None,
    wait: Annotated[bool, typer.Option(help="return when the pool has that many ready workers")] = True,
) -> None:
    """Give a pool more or fewer workers.

    Those that go finish their requests first.
    """
    from baton.local.commands import scale_pool

    scale_pool(name, pool, replicas, wait=wait)


@app.command()
def logs(
    worker: Annotated[
        str | None, typer.Argument(help="gateway, prefill-0, decode-0 ...; default: all", show_default=False)
    ] = None,
    name: NameOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on printing what is added")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="how many of the last lines")] = 50,
) -> None:
    """Print the logs of a service, also after it has ended."""
    from baton.local.commands import show_logs

    show_logs(name, worker, follow=follow, num_lines=lines)


@app.command()
def down(name: NameOption = None) -> None:
    """Stop a service; running requests may finish."""
    from baton.local.commands import stop_service

    stop_service(name)


class PullPart(StrEnum):
    """What `baton pull --only` fetches."""

    TOKENIZER = "tokenizer"


@app.command()
def pull(
    source: Annotated[str, typer.Argument(help="smollm2, a Hugging Face id, a folder or a .gguf file")],
    link: Annotated[
        Path | None, typer.Option(help="make this path lead to the model, whatever its own is", show_default=False)
    ] = None,
    only: Annotated[
        PullPart | None,
        typer.Option(help="without the weights, which a gateway does not need (Hugging Face ids)", show_default=False),
    ] = None,
) -> None:
    """Download a model into the model cache and check it."""
    from baton.local.model import link_model, pull_model

    path = pull_model(source, only_text=only is PullPart.TOKENIZER)
    if link is not None:
        link_model(path, link)
    typer.echo(str(path))


@app.command()
def plan(
    file: FileOption = None,
    before: Annotated[
        Path | None,
        typer.Option("--from", help="LLMService YAML that runs: print the steps from it to --file", show_default=False),
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="text, or yaml: the objects alone")] = "text",
) -> None:
    """Print what the operator would make of a service.

    Its objects on a cluster, and the steps in which they come. Touches nothing.
    """
    from baton.planned import show_plan

    show_plan(file, before, output)


@app.command()
def export(
    file: FileOption = None,
    helm: Annotated[bool, typer.Option("--helm", help="print values of the chart helm/baton instead")] = False,
) -> None:
    """Print the service for kubectl, or as Helm values."""
    from baton.export import for_helm, for_kubectl
    from baton.local.service_file import load_stated

    export = (for_helm if helm else for_kubectl)(*load_stated(file))
    for path in export.left_out:
        typer.echo(f"baton: left out {path}: only local mode reads it", err=True)
    typer.echo(export.text, nl=False)


@app.command()
def doctor(
    port: Annotated[int, typer.Option(min=1, max=65535, help="the port that `baton up` would use")] = 8000,
) -> None:
    """Say what this machine has and lacks, each line with a fix."""
    from baton.doctor import examine, report

    raise typer.Exit(report(examine(port)))


@app.command()
def version() -> None:
    """Print Baton's version."""
    from baton.version import find_version

    typer.echo(find_version())


def main() -> None:
    """The script's entry: runs a command and turns our errors into one message."""
    from baton.local.errors import LocalError

    try:
        app()
    except LocalError as error:
        print(f"baton: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
