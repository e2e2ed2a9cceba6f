"""Find or fetch the model of a service, and say what planning needs to know of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from baton.local.errors import LocalError
from baton.local.plan import ModelFacts
from modelfiles.config import ModelConfig
from modelfiles.errors import ModelFilesError
from modelfiles.progress import OnProgress, Progress
from modelfiles.read_config import load_config

if TYPE_CHECKING:
    from baton_operator.resources import LLMService

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_FLOAT32_BYTES = 4


class ModelError(LocalError):
    """The model cannot be found, fetched or read."""


def describe_model(service: LLMService, *, say: Callable[[str], None]) -> ModelFacts:
    """Fetch the model unless it is there, and read its sizes. Raises: ModelError."""
    source = service.spec.model.source
    path = find_model(source)
    try:
        config = load_config(path)
    except ModelFilesError as error:
        raise ModelError(f"spec.model.source = {source!r}: {error}") from error
    engine = service.spec.engine
    dtype = engine.dtype or ("bfloat16" if engine.device == "cuda" else "float32")  # as workers take it (engine.worker)
    dtype_bytes = _DTYPE_BYTES[dtype]
    kv_item_bytes = dtype_bytes if engine.kernels == "triton" else _FLOAT32_BYTES  # Triton keeps both in one type
    facts = ModelFacts(
        path=path,
        model_id=service.spec.model.name or _name_of(source),
        weight_bytes=num_parameters(config) * dtype_bytes,
        kv_bytes_per_token=2 * config.num_layers * config.num_kv_heads * config.head_dim * kv_item_bytes,
        max_model_len=config.max_position_embeddings,
    )
    say(f"model: {facts.model_id}, {num_parameters(config) / 1e6:,.0f} M parameters, {path}")
    return facts


def find_model(source: str) -> Path:
    """Where the model lies on disk, after fetching it if it is not there. Raises: ModelError."""
    from modelfiles.store import resolve

    return _with_progress(source, lambda show: resolve(source, on_progress=show))


def pull_model(source: str, *, only_text: bool) -> Path:
    """Fetch the model unless it is there, check every byte of it, and say where it lies. Raises: ModelError."""
    from modelfiles.store import pull

    return _with_progress(source, lambda show: pull(source, on_progress=show, only_text=only_text))


def link_model(path: Path, link: Path) -> None:
    """Make `link` a folder that leads to the model: one path for whoever starts with it, whatever the source was.

    Raises: ModelError where something else than such a link lies there.
    """
    try:
        if link.is_symlink():
            link.unlink()
        elif link.is_dir() and all(inner.is_symlink() for inner in link.iterdir()):
            for inner in link.iterdir():
                inner.unlink()
            link.rmdir()
        elif link.exists():
            raise ModelError(f"--link {link}: there is something else; name a path that does not exist")
        link.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            link.symlink_to(path.resolve())
        else:
            link.mkdir()
            (link / path.name).symlink_to(path.resolve())
    except OSError as error:
        raise ModelError(f"--link {link}: {error.strerror}") from error


def _with_progress(source: str, fetch: Callable[[OnProgress], Path]) -> Path:
    """Run `fetch` with its progress on stderr: stdout is for the path that `baton pull` prints."""
    show = _BarProgress(source) if sys.stderr.isatty() else LineProgress(source)
    try:
        return fetch(show)
    except ModelFilesError as error:
        raise ModelError(str(error)) from error
    finally:
        show.close()


def num_parameters(config: ModelConfig) -> int:
    """Weights of the decoder, norms and biases left out: they are less than a thousandth."""
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (2 * queries + 2 * keys)
    mlp = 3 * config.hidden_size * config.intermediate_size
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_layers * (attention + mlp)


def _name_of(source: str) -> str:
    """The name that clients send: a Hugging Face id or a known name as it is, of a path its last part."""
    path = Path(source)
    return path.resolve().name.removesuffix(".gguf") if path.exists() else source


_LINE_S = 1.0


class LineProgress:
    """A line each time another tenth of a stage is done, but none within a second: what is quick says nothing."""

    def __init__(self, source: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._clock = clock
        self._said = ""
        self._said_at = clock()

    def __call__(self, progress: Progress) -> None:
        tenths = 10 * progress.done_bytes // progress.total_bytes if progress.total_bytes else 0
        words, now = f"{self._source}: {progress.stage} {10 * tenths}%", self._clock()
        if words != self._said and now - self._said_at >= _LINE_S:
            self._said, self._said_at = words, now
            print(words, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is open."""


class _BarProgress:
    """A moving bar for each stage."""

    def __init__(self, source: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._source = source
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.stage not in self._tasks:
            self._bar.start()
            self._tasks[progress.stage] = self._bar.add_task(f"{self._source}: {progress.stage}")
        self._bar.update(self._tasks[progress.stage], completed=progress.done_bytes, total=progress.total_bytes)

    def close(self) -> None:
        self._bar.stop()
