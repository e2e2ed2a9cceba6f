"""Workers as processes: `kill -9` at every stage of a hand-over, the end with the parent, the registry file."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvtransfer import nixl_agent
from kvtransfer.protocol import baton_pb2 as pb
from tests.e2e import census
from tests.worker_processes import FAKE, ROOT, Processes
from tests.workers_harness import TRANSPORTS, FakeModel, Workers, gateway_to, until
from workerkit.process import EXIT_CANNOT_START

LOCAL = pb.DISAGGREGATION_NEVER
PROMPT = [3 + i * i % 50 for i in range(60)]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "point",
    ["kill-after-prompt-queued=1", "kill-after-chunk=1", "kill-after-chunk=2", "kill-after-block-published=1",
     "kill-after-block-published=9", "kill-after-prefill-done=1"],
)  # fmt: skip
async def test_a_prefill_worker_killed_at_any_stage_costs_no_token_and_no_block(
    workers: Workers, processes: Processes, point: str, transport: str
) -> None:
    flags = ("--failpoints", point, "--transports", transport)
    victim = await processes.start("tests.fake_worker", "prefill", *FAKE, flags=flags)
    good, d = await workers.prefill(transports=(transport,)), await workers.decode(transports=(transport,))
    async with gateway_to(d) as gateway:
        local = await gateway.ask(PROMPT, disaggregation=LOCAL, salt=b"l", logs=((), ()))
        answer = await gateway.ask(PROMPT, [victim.candidate, good.candidate], logs=((), ()))
        stats = (await answer.end()).stats
        assert await victim.ended() == -signal.SIGKILL
        assert answer.ids == local.ids
        if point != "kill-after-prefill-done=1":  # whose manifest may just have arrived in time
            assert stats.prefill_worker_id == good.process.config.worker_id
        alone = await gateway.ask(PROMPT, [victim.candidate], logs=((), ()), salt=b"x")
        assert (await alone.end()).stats.prefill_path == "local"
        assert alone.ids == local.ids
    await d.at_baseline()
    await good.at_baseline()


@pytest.mark.parametrize("point", ["kill-after-block-pulled=1", "kill-after-block-pulled=7", "kill-after-token=1"])
async def test_a_decode_worker_killed_at_any_stage_leaves_no_block_pinned_at_its_prefill_worker(
    workers: Workers, processes: Processes, point: str
) -> None:
    p = await workers.prefill(FakeModel(step_s=0.01))
    victim = await processes.start("tests.fake_worker", "decode", *FAKE, flags=("--failpoints", point))
    async with gateway_to(victim) as gateway:
        await gateway.start(PROMPT, [p.candidate])
        assert await victim.ended() == -signal.SIGKILL
    await p.at_baseline()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("side", "fault", "reason"),
    [
        # Prompts have 15 blocks. No later chunk of P's own may read the damaged one: it is the last of the second.
        ("prefill", "corrupt-published-block=30", "corrupt"),
        ("prefill", "stale-published-block=22", "stale"),
        ("decode", "truncate-pulled-block=22", "truncated"),
        ("decode", "replay-ticket=2", "pull"),
    ],
)
async def test_a_faulty_hand_over_never_yields_a_token(
    processes: Processes, side: str, fault: str, reason: str, transport: str
) -> None:
    point = ("--failpoints", fault)
    flags = ("--transports", transport)
    p, good, d = await asyncio.gather(
        processes.start("tests.fake_worker", "prefill", *FAKE, flags=(*flags, *(point if side == "prefill" else ()))),
        processes.start("tests.fake_worker", "prefill", *FAKE, flags=flags),
        processes.start("tests.fake_worker", "decode", *FAKE, flags=(*flags, *(point if side == "decode" else ()))),
    )
    async with gateway_to(d) as gateway:
        for number in range(4):
            how = {"logs": ((), ()), "salt": b"%d" % number, "num_logprobs": 2}
            remote = await gateway.ask(PROMPT, [p.candidate, good.candidate], **how)
            stats = (await remote.end()).stats
            local = await gateway.ask(PROMPT, disaggregation=LOCAL, **how | {"salt": b"local"})
            assert remote.ids == local.ids
            assert stats.prefill_path == "remote"
            assert (stats.prefill_worker_id == good.entry["worker_id"]) == (number == 1)
    told = await asyncio.to_thread(d.metrics)
    assert told.value("baton_prefill_fallbacks_total", reason=reason) == 1
    if reason != "pull":
        assert told.value("baton_verification_failures_total", kind=reason) == 1
    assert told.value("baton_transfers_total", outcome="failed") == 1
    assert told.value("baton_transfers_total", outcome="committed") == 4
    for process in (p, good, d):
        await process.at_baseline()


@pytest.mark.skipif(not nixl_agent.is_available(), reason="needs the extra nixl")
@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    "num_restarts", [4, pytest.param(100, marks=pytest.mark.soak)], ids=lambda count: f"{count}-restarts"
)
async def test_a_decode_worker_keeps_nothing_of_killed_prefill_workers(processes: Processes, num_restarts: int) -> None:
    """Ten hand-overs over NIXL from each incarnation of a real prefill worker, then `kill -9`."""
    flags = (*FAKE, "--transports", "nixl")
    held: list[census.Holdings] = []
    decode = await processes.start("tests.fake_worker", "decode", flags=flags)
    async with gateway_to(decode) as gateway:
        local = await gateway.ask(PROMPT, disaggregation=LOCAL, salt=b"l")
        for restart in range(num_restarts):
            prefill = await processes.start("tests.fake_worker", "prefill", flags=flags)
            for number in range(10):
                answer = await gateway.ask(PROMPT, [prefill.candidate], salt=b"%d-%d" % (restart, number))
                assert answer.ids == local.ids
                stats = (await answer.end()).stats
                assert (stats.prefill_path, stats.transport) == ("remote", "nixl")
            prefill.popen.kill()
            await prefill.ended()
            await until(lambda: decode.metrics().value("baton_transport_pairs", transport="nixl") == 0)
            held.append(census.holdings(decode.popen.pid))
    told = decode.metrics()
    assert told.value("baton_transfers_total", transport="nixl", outcome="committed") == 10 * num_restarts
    assert told.value("baton_transport_fallbacks_total") == 0
    assert told.is_at_rest
    # One more of each kind may be in the closing of the newest; none may come with every restart.
    first, last = held[1], held[-1]
    for kind in ("num_descriptors", "num_threads", "num_memory_files"):
        assert getattr(last, kind) <= getattr(first, kind) + 1, held


async def test_sigterm_removes_the_registry_file_and_ends_with_status_0(processes: Processes) -> None:
    worker = await processes.start("tests.fake_worker", "decode", *FAKE)
    assert await asyncio.to_thread(worker.probe, "/readyz") == 200
    assert await asyncio.to_thread(worker.probe, "/metrics") == 200
    worker.popen.send_signal(signal.SIGTERM)
    assert await worker.ended() == 0
    assert not worker.registry_file.exists()


async def test_a_worker_ends_when_its_parents_pipe_closes(processes: Processes) -> None:
    read_end, write_end = os.pipe()
    worker = await processes.start(
        "tests.fake_worker", "prefill", *FAKE, flags=("--parent-fd", str(read_end)), pass_fds=(read_end,)
    )
    os.close(read_end)
    os.close(write_end)
    assert await worker.ended() == 75


def test_failpoints_are_refused_where_they_are_not_allowed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    environment = {key: value for key, value in os.environ.items() if key != "BATON_ALLOW_FAILPOINTS"}
    refused = subprocess.run(
        [sys.executable, "-m", "prefill_service", "--model", ".", "--worker-id", "p", "--log-format", "text",
         "--secret-file", str(tmp_path / "secret"), "--failpoints", "kill-after-token=1"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert refused.returncode == EXIT_CANNOT_START
    assert "BATON_ALLOW_FAILPOINTS=1" in refused.stderr


@pytest.mark.parametrize("service", ["prefill_service", "decode_service"])
def test_a_model_that_is_not_there_is_told_in_one_line(tmp_path: Path, service: str) -> None:
    (tmp_path / "secret").write_text("s")
    refused = subprocess.run(
        [sys.executable, "-m", service, "--model", "/nowhere", "--worker-id", "w", "--log-format", "text",
         "--log-level", "error", "--secret-file", str(tmp_path / "secret")],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert refused.returncode == EXIT_CANNOT_START
    assert "/nowhere does not exist" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("service", ["prefill_service", "decode_service"])
def test_help_names_every_setting(service: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", service, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    for flag in ("--model", "--secret-file", "--registry-dir", "--kv-memory", "--parent-fd", "--failpoints"):
        assert flag in shown


async def test_two_processes_with_a_real_model_give_bitwise_the_tokens_of_one(
    processes: Processes, tiny_llama: Path
) -> None:
    flags = ("--model", str(tiny_llama), "--deterministic", "--threads", "1", "--kv-memory", "16MiB")
    p = await processes.start("prefill_service", flags=flags)
    d = await processes.start("decode_service", flags=flags)
    async with gateway_to(d) as gateway:
        for length in (1, 15, 16, 17, 100, 300):
            prompt = [3 + (i * 7 + length) % 250 for i in range(length)]
            how = {"logs": ((), ()), "max_tokens": 24, "num_logprobs": 3}
            local = await gateway.ask(prompt, disaggregation=LOCAL, salt=b"l", **how)
            remote = await gateway.ask(prompt, [p.candidate], salt=b"r", **how)
            assert (await remote.end()).stats.prefill_path == "remote"
            assert remote.ids == local.ids
            assert [t.logprob for t in remote.tokens[1]] == [t.logprob for t in local.tokens[1]]
            logs = [remote.ids[0][:7], remote.ids[1][:11]]
            replay = await gateway.ask(prompt, [p.candidate], salt=b"again", **how | {"logs": logs})
            assert replay.ids == {0: local.ids[0][7:], 1: local.ids[1][11:]}
