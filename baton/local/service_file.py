"""Read an LLMService from a YAML file, or the built-in default."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import yaml

from baton.local.errors import LocalError
from baton_operator.resources import LLMService, ResourceError, parse_llm_service


class ServiceFileError(LocalError):
    """The file cannot be read or says something that cannot be used."""


def load_service(file: Path | None, port: int | None) -> LLMService:
    """The service that `file` describes (none: the default one), with the port of the command line.

    Paths in the file are relative to it. Raises: ServiceFileError.
    """
    service = LLMService() if file is None else _read(file)
    gateway = service.spec.gateway
    changes: dict[str, object] = {} if port is None else {"port": port}
    if gateway.api_keys_file is not None and file is not None:
        keys = (file.parent / gateway.api_keys_file).resolve()
        if not keys.is_file():
            raise ServiceFileError(f"{file}: spec.gateway.apiKeysFile = {gateway.api_keys_file!r}: there is no {keys}")
        changes["api_keys_file"] = str(keys)
    if not changes:
        return service
    spec = service.spec.model_copy(update={"gateway": gateway.model_copy(update=changes)})
    return service.model_copy(update={"spec": spec})


def load_stated(file: Path | None) -> tuple[LLMService, dict[str, Any]]:
    """The service, and the document as the user wrote it. Raises: ServiceFileError."""
    if file is None:
        return LLMService(), {}
    document = _parse(file)
    service = _validate(document, file)
    return service, cast("dict[str, Any]", document)


def _read(file: Path) -> LLMService:
    return _validate(_parse(file), file)


def _parse(file: Path) -> object:
    try:
        return yaml.safe_load(file.read_text())
    except OSError as error:
        raise ServiceFileError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ServiceFileError(f"{file} is not YAML: {error}") from error


def _validate(document: object, file: Path) -> LLMService:
    try:
        return parse_llm_service(document, where=str(file))
    except ResourceError as error:
        raise ServiceFileError(str(error)) from error
