"""Models of the Hugging Face hub, in the hub client's own cache, which other tools share.

Its settings are the client's: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelfiles.cache import explained
from modelfiles.errors import FetchError, ModelNotFound, OfflineError
from modelfiles.progress import OnProgress, Progress, Stage

if TYPE_CHECKING:
    from huggingface_hub.utils.tqdm import tqdm

# What a gateway needs: to count tokens, and to write prompts.
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
# No pickles (they run code), no second copies of the weights ("original/", consolidated.*), no images.
ALLOWED_FILES = (*TEXT_FILES, "model*.safetensors", "model.safetensors.index.json")
_BYTES_BAR = "huggingface_hub.snapshot_download"  # the client's name of the bar that counts bytes on disk
_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+\.gguf))?(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, slots=True)
class HubModel:
    """owner/name, owner/name@revision, or owner/name/file.gguf@revision."""

    repo: str
    file: str | None
    revision: str | None

    def __str__(self) -> str:
        return "/".join(part for part in (self.repo, self.file) if part) + (
            f"@{self.revision}" if self.revision else ""
        )


def parse_hub_id(source: str) -> HubModel | None:
    """None: `source` does not look like an id of the hub."""
    match = _ID.fullmatch(source)
    return HubModel(match["repo"], match["file"], match["revision"]) if match else None


def find_on_hub(model: HubModel, *, only_text: bool = False) -> Path | None:
    """The model in the hub client's cache, without the network."""
    try:
        path = _fetch(model, local_files_only=True)
    except OfflineError:
        return None
    has_weights = path.is_file() or any(path.glob("model*.safetensors"))
    return path if only_text or has_weights else None  # the cache may hold what a gateway fetched, and nothing else


def pull_from_hub(model: HubModel, on_progress: OnProgress, *, only_text: bool = False) -> Path:
    """Fetch what is missing or has changed. Files that are whole are kept; interrupted ones continue.

    `only_text`: of a model in a folder without its weights; a .gguf file has it all in one.
    Raises: ModelNotFound, OfflineError (HF_HUB_OFFLINE), FetchError (network, access), CacheError.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        found = find_on_hub(model, only_text=only_text)
        if found is None:
            raise OfflineError(
                f"{model} is not in the Hugging Face cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE is set; unset "
                "it, or copy the model here and name its folder"
            )
        return found
    files = TEXT_FILES if only_text else ALLOWED_FILES
    return _fetch(model, files, local_files_only=False, bar=_bar_class(on_progress))


def _fetch(
    model: HubModel,
    files: tuple[str, ...] = ALLOWED_FILES,
    *,
    local_files_only: bool,
    bar: type[tqdm] | None = None,
) -> Path:
    from huggingface_hub import (
        constants,
        hf_hub_download,  # pyright: ignore[reportUnknownVariableType]  (untyped dicts in parameters we do not use)
        snapshot_download,  # pyright: ignore[reportUnknownVariableType]  (same)
    )

    with _translated(model), explained(Path(constants.HF_HUB_CACHE)):
        if model.file is not None:
            path = hf_hub_download(
                model.repo, model.file, revision=model.revision, local_files_only=local_files_only, tqdm_class=bar
            )
        else:
            path = snapshot_download(
                model.repo,
                revision=model.revision,
                allow_patterns=list(files),
                local_files_only=local_files_only,
                tqdm_class=bar,
            )
    return Path(path)


@contextmanager
def _translated(model: HubModel) -> Generator[None]:
    """The hub client's errors, most special first: they inherit from each other."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise FetchError(f"{model} is gated: accept its terms on its page, then set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(f"the Hugging Face hub has no model {model}, or it is private: set HF_TOKEN") from error
    except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise ModelNotFound(f"{model.repo} has no such revision or file: {model}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise OfflineError(
            f"{model} is not in the Hugging Face cache and the hub cannot be reached; check the network, "
            "or name a local folder"
        ) from error
    except errors.HfHubHTTPError as error:
        raise FetchError(f"the Hugging Face hub refused {model}: {error}") from error


def _bar_class(on_progress: OnProgress) -> type[tqdm]:
    """The documented way to hear of the client's progress is a tqdm of one's own."""
    from huggingface_hub.utils.tqdm import tqdm

    class Reporter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.done_bytes = int(kwargs.get("initial") or 0)
            self.counts_bytes = kwargs.get("name") in (_BYTES_BAR, "huggingface_hub.hf_hub_download")
            kwargs["disable"] = True  # it reports; it does not draw
            super().__init__(*args, **kwargs)  # pyright: ignore[reportUnknownMemberType]  (tqdm is untyped)

        def update(self, n: float | None = 1) -> bool | None:
            self.done_bytes += int(n or 0)
            if self.counts_bytes:
                on_progress(Progress(Stage.DOWNLOAD, self.done_bytes, int(self.total) if self.total else None))
            return super().update(n)

    return Reporter
