"""Read an LLMService from a YAML file, or the built-in default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from baton.local.errors import LocalError
from baton_operator.resources import LLMService, ResourceError, parse_llm_service


class ServiceFileError(LocalError):
    """The file cannot be read or says something that cannot be used."""


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the command line of `baton up` says instead of the file."""

    port: int | None = None
    device: str | None = None
    kernels: str | None = None

    def arguments(self) -> list[str]:
        """The same as flags."""
        stated = {"--port": self.port, "--device": self.device, "--kernels": self.kernels}
        return [word for flag, value in stated.items() if value is not None for word in (flag, str(value))]


def load_service(file: Path | None, overrides: Overrides) -> LLMService:
    """The service that `file` describes (none: the default one), with what the command line says instead.

    Paths in the file are relative to it. Raises: ServiceFileError.
    """
    service = LLMService() if file is None else _read(file)
    gateway, engine = service.spec.gateway, service.spec.engine
    changes: dict[str, object] = {} if overrides.port is None else {"port": overrides.port}
    if gateway.api_keys_file is not None and file is not None:
        keys = (file.parent / gateway.api_keys_file).resolve()
        if not keys.is_file():
            raise ServiceFileError(f"{file}: spec.gateway.apiKeysFile = {gateway.api_keys_file!r}: there is no {keys}")
        changes["api_keys_file"] = str(keys)
    stated = {"device": overrides.device, "kernels": overrides.kernels}
    engine_changes = {name: None if value == "auto" else value for name, value in stated.items() if value is not None}
    parts = {"gateway": gateway.model_copy(update=changes), "engine": engine.model_copy(update=engine_changes)}
    return service.model_copy(update={"spec": service.spec.model_copy(update=parts)})


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
        text = file.read_text()
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader), file)
        return yaml.safe_load(text)
    except OSError as error:
        raise ServiceFileError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ServiceFileError(f"{file} is not YAML: {error}") from error


def _refuse_repeated_keys(node: yaml.Node | None, file: Path) -> None:
    """A YAML reader takes the last of two values in silence; kubectl refuses the file, and so do we."""
    match node:
        case yaml.MappingNode():
            seen: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise ServiceFileError(f"{file}, line {key.start_mark.line + 1}: {key.value!r} is stated twice")
                seen.add(key.value)
                _refuse_repeated_keys(value, file)
        case yaml.SequenceNode():
            for each in node.value:
                _refuse_repeated_keys(each, file)
        case _:
            pass


def _validate(document: object, file: Path) -> LLMService:
    try:
        return parse_llm_service(document, where=str(file))
    except ResourceError as error:
        raise ServiceFileError(str(error)) from error
