"""Build one frozen dataclass from flags > environment > file > defaults, and say exactly what is wrong with a value.

    @dataclass(frozen=True)
    class DecodeConfig:
        block_size: int = option(16, help="tokens per KV block", minimum=1)

    config = load(DecodeConfig, prog="python -m decode_service")

The flag is `--block-size`, the variable `BATON_BLOCK_SIZE`, the key in the file `block_size`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

ENV_PREFIX = "BATON_"

T = TypeVar("T")
EnumT = TypeVar("EnumT", bound=Enum)


class ConfigError(Exception):
    """A setting that cannot be used; the message names field, value and limit."""


@dataclass(frozen=True, slots=True)
class _Option:
    """What `option()` notes about a field."""

    help: str
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...] | None
    parse: Callable[[str], Any] | None
    check: Callable[[Any], str | None] | None
    metavar: str | None


def option(
    default: Any = MISSING,
    *,
    help: str,  # noqa: A002  argparse's own word
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
    parse: Callable[[str], Any] | None = None,
    check: Callable[[Any], str | None] | None = None,
    metavar: str | None = None,
) -> Any:
    """Declare a setting. Without a default it is required.

    `parse` reads text of any source (raises ValueError); `check` returns what is wrong with a value, or None.
    """
    note = _Option(help, minimum, maximum, choices, parse, check, metavar)
    return dataclasses.field(default=default, metadata={"option": note})


def load(cls: type[T], *, prog: str, description: str = "", argv: Sequence[str] | None = None) -> T:
    """Read the process's settings, or print what is wrong and exit with status 2."""
    try:
        return build(cls, sys.argv[1:] if argv is None else argv, os.environ, prog=prog, description=description)
    except ConfigError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def build(
    cls: type[T], argv: Sequence[str], environ: Mapping[str, str], *, prog: str = "baton", description: str = ""
) -> T:
    """Pure part of `load`: flags, then environment, then file, then defaults; validated.

    Raises: ConfigError. `--help` and unknown flags exit as argparse does.
    """
    types_by_name = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if "option" in f.metadata}  # type: ignore[arg-type]  # any dataclass
    flags = vars(_parser(fields, types_by_name, prog, description).parse_args(list(argv)))
    config_file = flags.pop("config", None) or environ.get(ENV_PREFIX + "CONFIG")
    file_values = _read_file(Path(config_file), fields) if config_file else {}
    values: dict[str, Any] = {}
    for name, field in fields.items():
        found = _first(name, flags, environ, file_values)
        if found is None:
            if field.default is MISSING:
                raise ConfigError(
                    f"{_flag(name)} is required (or variable {ENV_PREFIX}{name.upper()}, or key {name} in --config)"
                )
            values[name] = field.default
            continue
        source, raw = found
        values[name] = _convert(field.metadata["option"], types_by_name[name], raw, name, source)
    return cls(**values)


def one_of_or_auto(kind: type[EnumT]) -> Callable[[str], EnumT | None]:
    """A parser for `option`: a member of `kind` by its value, or None for auto."""

    def parse(text: str) -> EnumT | None:
        return None if text.strip().lower() == "auto" else _parse_enum(kind, text, "auto")

    return parse


def parse_bytes(text: str) -> int:
    """Read `268435456`, `256MiB` or `1.5GiB` as bytes. Raises: ValueError."""
    for suffix, factor in (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30)):
        if text.endswith(suffix):
            return int(float(text[: -len(suffix)]) * factor)
    return int(text)


def parse_address(text: str) -> tuple[str, int]:
    """Read `host:port` or `[v6]:port`; port 0 means any. Raises: ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError("expected HOST:PORT with a port from 0 to 65535")
    return host.strip("[]"), int(port)


def power_of_two(value: int) -> str | None:
    return None if value > 0 and value & (value - 1) == 0 else "must be a power of two"


# ---------------------------------------------------------------- parts


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parser(
    fields: Mapping[str, dataclasses.Field[Any]], hints: Mapping[str, Any], prog: str, description: str
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        epilog=f"Each flag is also a variable ({ENV_PREFIX}<NAME>) and a key of the --config file. Flags win.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings")
    for name, field in fields.items():
        note: _Option = field.metadata["option"]
        text = (note.help + limits_text(note) + _default_text(field.default)).replace("%", "%%")
        if _plain_type(hints[name]) is bool:
            parser.add_argument(_flag(name), action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            metavar = note.metavar or ("|".join(note.choices) if note.choices else name.upper())
            parser.add_argument(_flag(name), default=None, metavar=metavar, help=text)
    return parser


def _default_text(default: object) -> str:
    if default is MISSING:
        return " (required)"
    if default is None or default == "" or default == ():
        return ""
    if isinstance(default, tuple):
        default = ",".join(str(item) for item in typing.cast("tuple[object, ...]", default))
    return f" (default: {default.value if isinstance(default, Enum) else default})"


def limits_text(note: _Option) -> str:
    """A setting's limits, as they end a line of help."""
    match note.minimum, note.maximum:
        case None, None:
            return ""
        case low, None:
            return f", at least {_plain(low)}"
        case None, high:
            return f", at most {_plain(high)}"
        case low, high:
            return f", {_plain(low)} to {_plain(high)}"


def _plain(limit: float) -> str:
    return str(int(limit)) if limit == int(limit) else str(limit)


def _read_file(path: Path, fields: Mapping[str, object]) -> dict[str, object]:
    import yaml  # only when a file is given: `--help` stays fast

    try:
        loaded: object = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"--config {path}: expected a mapping, found {type(loaded).__name__}")
    values = {str(key).replace("-", "_"): value for key, value in typing.cast("dict[object, object]", loaded).items()}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"--config {path}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(fields))}")
    return values


def _first(
    name: str, flags: Mapping[str, object], environ: Mapping[str, str], file_values: Mapping[str, object]
) -> tuple[str, object] | None:
    """(source in words, raw value) of the strongest source that states the field."""
    if flags.get(name) is not None:
        return _flag(name), flags[name]
    variable = ENV_PREFIX + name.upper()
    if variable in environ:
        return f"variable {variable}", environ[variable]
    if file_values.get(name) is not None:
        return f"key {name} in --config", file_values[name]
    return None


def _plain_type(hint: Any) -> Any:
    """`X` of `X | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _convert(note: _Option, hint: Any, raw: object, name: str, source: str) -> Any:
    try:
        value = _parse(note, _plain_type(hint), raw)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{source}: {name} = {raw!r}: {error}") from error
    wrong = _what_is_wrong(note, value)
    if wrong:
        raise ConfigError(f"{source}: {name} = {raw!r}: {wrong}")
    return value


def _parse(note: _Option, kind: Any, raw: object) -> Any:
    if note.parse is not None and isinstance(raw, (str, int, float)):
        return note.parse(str(raw))
    if kind is bool:
        return _parse_bool(raw)
    if kind is int:
        if isinstance(raw, (bool, float)):
            raise ValueError("expected a whole number")
        return int(str(raw))
    if kind is float:
        return float(str(raw))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _parse_enum(kind, str(raw))
    if kind is Path:
        return Path(str(raw)).expanduser()
    if typing.get_origin(kind) is tuple:
        items = typing.cast("list[object]", raw) if isinstance(raw, list) else str(raw).split(",")
        return tuple(str(item).strip() for item in items if str(item).strip())
    return str(raw)


def _parse_bool(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    word = str(raw).strip().lower()
    if word not in words:
        raise ValueError("expected true or false")
    return words[word]


def _parse_enum(kind: type[EnumT], raw: str, *others: str) -> EnumT:
    for member in kind:
        if str(member.value).lower() == raw.strip().lower():
            return member
    raise ValueError(f"must be one of {', '.join([*others, *(str(member.value) for member in kind)])}")


def _what_is_wrong(note: _Option, value: Any) -> str | None:
    if note.choices is not None:
        chosen = typing.cast("tuple[str, ...]", value) if isinstance(value, tuple) else (str(value),)
        if any(item not in note.choices for item in chosen):
            return f"must be one of {', '.join(note.choices)}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if note.minimum is not None and value < note.minimum:
            return f"must be at least {_plain(note.minimum)}"
        if note.maximum is not None and value > note.maximum:
            return f"must be at most {_plain(note.maximum)}"
    return note.check(value) if note.check is not None else None
