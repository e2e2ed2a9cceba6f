"""The operator's process: what it is told by default, and what it needs of the machine that it runs on."""

from __future__ import annotations

import asyncio
import getpass
from typing import Any

import kopf
import pytest

from baton_operator import __main__ as command
from baton_operator import run
from baton_operator.desired import Platform
from baton_operator.objects import GatewayReport
from baton_operator.probe import Gateways
from helm.values import Values


class _Api:
    """No cluster: it has no optional kinds."""

    def __init__(self, *_: object) -> None: ...

    async def has(self, _: object) -> bool:
        return False

    async def close(self) -> None: ...


def test_images_that_nobody_names_are_those_of_our_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATON_REDIS_IMAGE", raising=False)
    options = vars(command._parser().parse_args(["run"]))  # pyright: ignore[reportPrivateUsage]
    platform, chart = Platform(), Values.model_validate({}).images
    for option, default, image in (
        ("gateway_image", platform.gateway_image, chart.gateway),
        ("worker_image", platform.worker_image, chart.worker),
        ("redis_image", platform.redis_image, chart.redis),
    ):
        assert options[option] == default == f"{image.repository}:latest"


def test_a_user_without_a_name_may_run_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """`runAsUser` may be any number; kopf asks for the user's name where it is given no identity, and ends."""

    def nameless() -> str:
        raise OSError("No username set in the environment")

    given: dict[str, Any] = {}

    async def operator(**options: Any) -> None:
        given.update(options)

    async def configuration() -> None: ...

    monkeypatch.setattr(getpass, "getuser", nameless)
    monkeypatch.setattr(kopf, "operator", operator)
    monkeypatch.setattr(run, "Api", _Api)
    monkeypatch.setattr(run, "client_configuration", configuration)
    flags = ["run", "--http", "127.0.0.1:0", "--operator-namespace", "here"]
    options = command._parser().parse_args(flags)  # pyright: ignore[reportPrivateUsage]
    asyncio.run(run._run(options, "here"))  # pyright: ignore[reportPrivateUsage]
    assert given["identity"]


def test_a_gateway_is_heard_on_what_it_was_told_and_on_where_it_sends_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def call(*_: object) -> tuple[int, dict[str, Any]]:
        return 200, {"servingRevision": "new", "routedRevision": "old", "registry": {"connected": False}}

    monkeypatch.setattr(Gateways, "_call", call)
    assert asyncio.run(Gateways().ask(["g0"], "secret")) == (GatewayReport("g0", "new", "old", False),)


async def test_kopf_keeps_no_notes_on_objects() -> None:
    memories = run.ForgetfulMemories()
    body: Any = {"metadata": {"uid": "a"}}
    await memories.recall(body, noticed_by_listing=True)
    await memories.forget(body)  # a deletion of what is not there
    assert list(memories.iter_all_memories()) == []
