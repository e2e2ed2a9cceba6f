"""Membership without a cluster: what an entry may be, who is believed, what silence changes (nothing)."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.config import RegistryConfig
from registry.directory import DirectoryMembership
from registry.dns import DnsSource, join_address
from registry.entry import MAX_ENTRY_BYTES, Entry, decode, encode
from registry.errors import BadEntry, RegistryError, Unreachable
from registry.keeper import LEASE_S, Keeper, pause_s
from registry.membership import Hint, Snapshot
from registry.opening import open_memberships, open_table
from registry.redis_url import parse_url, read_address
from registry.table import Table, Watched

ENTRY = Entry("chat-prefill-0", "prefill", "10.0.0.7:7000", "10.0.0.7:7001", "ab12cd34", "layout", "0f" * 16, 7)
KEY = b"key of this service"


# ---------------------------------------------------------------- entries


def test_an_entry_is_read_as_it_was_written() -> None:
    assert decode(encode(ENTRY)) == ENTRY
    assert decode(encode(ENTRY, KEY), KEY) == ENTRY
    assert decode(encode(replace(ENTRY, address="[fd00::1]:7000")))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("worker_id", ""), ("worker_id", "../etc"), ("worker_id", ".hid"), ("worker_id", "a" * 254), ("worker_id", 7),
        ("role", "gateway"), ("role", ["prefill"]), ("role", None),
        ("address", "10.0.0.7"), ("address", "10.0.0.7:0"), ("address", "10.0.0.7:65536"), ("address", "a b:1"),
        ("address", "unix:/run/x:1"), ("address", "fd00::1:7000"), ("address", "a:1\n"), ("address", "ipv4:a,b:1"),
        ("http", "x" * 254 + ":1"), ("http", None),
        ("revision", "a" * 64), ("revision", "a/b"), ("fingerprint", "a b"), ("fingerprint", "x" * 257),
        ("boot_id", "0f"), ("boot_id", "0F" * 16), ("pid", True), ("pid", -1), ("pid", 1 << 32), ("pid", "7"),
    ],
)  # fmt: skip
def test_a_field_that_is_not_what_it_must_be_makes_no_entry(field: str, value: object) -> None:
    fields = json.loads(encode(ENTRY)) | {field: value}
    with pytest.raises(BadEntry, match=field):
        decode(json.dumps(fields).encode())


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"7", b"{}", b'{"a":', b"\xff\xfe", b"[" * 2000, encode(ENTRY)[:-1] + b',"more":1}',
     encode(ENTRY) + b" " * MAX_ENTRY_BYTES],
)  # fmt: skip
def test_what_is_no_entry_is_refused(data: bytes) -> None:
    with pytest.raises(BadEntry):
        decode(data)


@given(st.binary(max_size=400))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    with pytest.raises(BadEntry):
        decode(data, KEY)


@given(st.sampled_from(["worker_id", "role", "address", "http", "revision", "fingerprint", "boot_id", "pid", "mac"]))
def test_who_has_not_the_secret_can_change_no_field(field: str) -> None:
    """Who can write to Redis would else send gateways, with the service's secret, where he likes."""
    other = Entry("x", "decode", "6.6.6.6:1", "6.6.6.6:2", "r", "f", "ee" * 16, 8)
    signed = json.loads(encode(ENTRY, KEY))
    signed[field] = json.loads(encode(other, b"another"))[field]
    with pytest.raises(BadEntry, match="signed"):
        decode(json.dumps(signed).encode(), KEY)
    with pytest.raises(BadEntry, match="signed"):
        decode(encode(ENTRY), KEY)


# ---------------------------------------------------------------- a folder


async def test_a_worker_is_found_in_the_folder_while_announced(tmp_path: Path) -> None:
    folder = DirectoryMembership(tmp_path / "reg")
    assert await folder.snapshot() == {}
    await folder.announce(ENTRY, LEASE_S)
    assert [path.name for path in (tmp_path / "reg").iterdir()] == ["chat-prefill-0.json"]
    assert await folder.snapshot() == {ENTRY.address: Hint(ENTRY.address, "prefill", "chat-prefill-0", "ab12cd34")}
    await folder.withdraw(ENTRY)
    await folder.withdraw(ENTRY)
    assert await folder.snapshot() == {}


async def test_leaving_does_not_remove_the_file_of_a_successor(tmp_path: Path) -> None:
    folder = DirectoryMembership(tmp_path)
    await folder.announce(replace(ENTRY, boot_id="11" * 16), LEASE_S)
    await folder.withdraw(ENTRY)
    assert len(await folder.snapshot()) == 1


async def test_files_that_are_half_written_foreign_or_gone_are_nobody(tmp_path: Path) -> None:
    folder = DirectoryMembership(tmp_path)
    await folder.announce(ENTRY, LEASE_S)
    (tmp_path / "half.json").write_bytes(encode(ENTRY)[:20])
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / ".x.json.tmp").write_bytes(encode(ENTRY))
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "nothing")
    assert list(await folder.snapshot()) == [ENTRY.address]


# ---------------------------------------------------------------- where Redis is


def test_a_url_says_host_port_user_password_and_database() -> None:
    address = parse_url("rediss://chat:p%23ss@redis.ns.svc:6380/2")
    assert (address.host, address.port, address.db, address.username) == ("redis.ns.svc", 6380, 2, "chat")
    assert (address.password, address.is_tls) == ("p#ss", True)
    assert (parse_url("redis://h").port, parse_url("redis://[fd00::1]:7").host) == (6379, "fd00::1")


@pytest.mark.parametrize(
    "url",
    ["", "http://u:hunter2@h", "redis://", "redis://u:hunter2@h:port", "redis://u:hunter2@h/x", "redis://u:hunter2@h?x=1",
     "redis://u:hunter#2@h", "redis://u:hunter2@h:99999", "u:hunter2@h"],
)  # fmt: skip
def test_a_url_that_cannot_be_used_is_refused_without_showing_a_password(url: str) -> None:
    with pytest.raises(ValueError, match="registry URL: expected redis://") as refused:
        open_memberships(RegistryConfig(registry=url or "x"), KEY)
    assert "hunter" not in str(refused.value)


def test_no_text_form_shows_the_password(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter2\n")
    for address in (
        parse_url("redis://u:hunter2@h"),
        read_address(RegistryConfig(registry="redis://u@h", registry_password_file=file)),
    ):
        assert address.password == "hunter2"
        assert "hunter2" not in f"{address} {address!r}"


def test_files_are_read_again_and_one_source_of_the_url_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text("redis://u:one@h\n")
    config = RegistryConfig(registry_file=file)
    assert read_address(config).password == "one"
    file.write_text("redis://u:two@h\n")
    assert read_address(config).password == "two"
    with pytest.raises(ValueError, match="both given"):
        open_memberships(RegistryConfig(registry="redis://h", registry_file=file), KEY)
    with pytest.raises(ValueError, match="without TLS"):
        open_memberships(RegistryConfig(registry="redis://h", registry_ca_file=file), KEY)


# ---------------------------------------------------------------- DNS


def source(answers: Sequence[Sequence[str] | OSError]) -> DnsSource:
    left = list(answers)

    async def look_up(host: str, port: int) -> Sequence[str]:
        answer = left.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    return DnsSource("chat-prefill", 7000, look_up)


async def test_every_address_behind_a_name_is_a_hint_without_a_role() -> None:
    found = await source([["10.0.0.1", "fd00::1"]]).snapshot()
    assert found == {address: Hint(address) for address in ("10.0.0.1:7000", "[fd00::1]:7000")}
    assert join_address("::1", 1) == "[::1]:1"


async def test_a_resolver_that_fails_is_not_an_empty_service() -> None:
    dns = source([OSError(socket.EAI_AGAIN, "try again"), ()])
    with pytest.raises(Unreachable, match="try again"):
        await dns.snapshot()
    assert await dns.snapshot() == {}


async def test_a_name_with_more_addresses_than_a_service_has_is_refused() -> None:
    with pytest.raises(RegistryError, match="4097"):
        await source([[f"10.0.{n >> 8}.{n & 255}" for n in range(4097)]]).snapshot()


async def test_the_systems_resolver_answers_for_localhost() -> None:
    found = await DnsSource("localhost", 7000).snapshot()
    assert {"127.0.0.1:7000"} <= set(found) <= {"127.0.0.1:7000", "[::1]:7000"}


# ---------------------------------------------------------------- what a gateway knows


class Scripted:
    """A registry whose answers are given."""

    name = "scripted"

    def __init__(self, *answers: Snapshot | RegistryError) -> None:
        self.answers = list(answers)

    async def snapshot(self) -> Snapshot:
        answer = self.answers.pop(0)
        if isinstance(answer, RegistryError):
            raise answer
        return answer

    async def close(self) -> None:
        pass


def hints(*addresses: str, role: str = "") -> Snapshot:
    return {address: Hint(address, role) for address in addresses}


async def test_silence_changes_nothing_and_shows() -> None:
    now = 100.0
    table = Table([Watched(Scripted(hints("a:1"), Unreachable("gone"), Unreachable("gone"), hints("b:1")), 1.0)],
                  clock=lambda: now)  # fmt: skip
    assert [(s.is_connected, s.age_s) for s in table.statuses()] == [(False, None)]
    await table.ask(0)
    assert [(s.is_connected, s.age_s, s.num_members) for s in table.statuses()] == [(True, 0.0, 1)]
    now = 160.0
    for _ in range(2):
        await table.ask(0)
        assert list(table.hints()) == ["a:1"]
        (status,) = table.statuses()
        assert (status.is_connected, status.age_s, status.error) == (False, 60.0, "gone")
    await table.ask(0)
    assert list(table.hints()) == ["b:1"]
    assert table.statuses()[0].is_connected


async def test_sources_add_up_and_a_known_role_wins() -> None:
    first, second = Scripted(hints("a:1", role="prefill")), Scripted(hints("a:1", "b:1"))
    table = Table([Watched(first, 1.0), Watched(second, 1.0)], seeds=["a:1", "c:1"])
    await table.ask(0)
    await table.ask(1)
    assert {address: hint.role for address, hint in table.hints().items()} == {"a:1": "prefill", "b:1": "", "c:1": ""}


async def test_a_source_that_fails_is_asked_again_ever_later_and_at_different_times() -> None:
    failing = Scripted(*[Unreachable("gone")] * 40)
    table = Table([Watched(failing, 1.0)], rng=random.Random(1))
    pauses = [await table.ask(0) for _ in range(40)]
    assert min(pauses) >= 0.25
    assert max(pauses) <= 5.25
    assert pauses[0] < 0.75 < sum(pauses[20:]) / 20
    assert len(set(pauses)) == len(pauses)


async def test_a_bug_with_one_source_stops_neither_it_nor_the_others() -> None:
    class Broken(Scripted):
        async def snapshot(self) -> Snapshot:
            raise KeyError("bug")

    table = Table([Watched(Broken(), 1.0), Watched(Scripted(hints("a:1")), 60.0)])
    table.start()
    while not table.hints():
        await asyncio.sleep(0)
    await table.stop()


def test_dns_names_are_asked_apart_so_that_one_that_fails_hides_no_other() -> None:
    table = open_table(RegistryConfig(), KEY, dns=[("p", 1), ("d", 1)])
    assert [status.name for status in table.statuses()] == ["dns p", "dns d"]


# ---------------------------------------------------------------- what a worker does


class Home:
    """A membership in memory that can be away."""

    name = "home"

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.is_away = False
        self.num_closed = 0

    async def announce(self, entry: Entry, lease_s: float) -> None:
        if self.is_away:
            raise Unreachable("away")
        self.entries = [entry]

    async def withdraw(self, entry: Entry) -> None:
        if self.is_away:
            raise Unreachable("away")
        self.entries = []

    async def snapshot(self) -> Snapshot:
        return {}

    async def close(self) -> None:
        self.num_closed += 1


async def test_a_worker_announces_itself_again_after_a_flush_and_an_outage() -> None:
    home = Home()
    keeper = Keeper(home, ENTRY)
    assert 4.0 <= await keeper.announce_once() <= 6.0
    home.entries.clear()
    await keeper.announce_once()
    assert home.entries == [ENTRY]
    home.is_away = True
    assert await keeper.announce_once() < 1.0
    assert not keeper.is_connected
    home.is_away = False
    await keeper.announce_once()
    assert keeper.is_connected


async def test_withdrawing_ends_in_time_whether_or_not_anybody_answers() -> None:
    home = Home()
    keeper = Keeper(home, ENTRY)
    await keeper.announce_once()
    await keeper.withdraw()
    await keeper.withdraw()
    assert (home.entries, home.num_closed) == ([], 1)
    home.is_away = True
    await Keeper(home, ENTRY).withdraw()


def test_workers_that_lost_the_registry_together_do_not_return_together() -> None:
    """F16: 200 workers whose registry went at one moment: never many at once, nobody later than its lease."""
    rng = random.Random(5)
    assert all(4.0 <= pause_s(0, LEASE_S, rng) <= 6.0 for _ in range(200))
    for num_failed in (4, 8, 1000):
        pauses = [pause_s(num_failed, LEASE_S, rng) for _ in range(200)]
        assert max(pauses) <= LEASE_S / 2
        in_first_tenth = sum(pause < 0.5 for pause in pauses)
        assert in_first_tenth < 30
