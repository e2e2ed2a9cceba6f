"""Settings: which source wins, and what a wrong value is told."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest

from servicekit.config import ConfigError, build, load, one_of_or_auto, option, parse_address, parse_bytes, power_of_two


class Mode(Enum):
    AUTO = "auto"
    NEVER = "never"


@dataclass(frozen=True)
class Settings:
    model: Path = option(help="model folder")
    block_size: int = option(16, help="tokens per block", minimum=1, maximum=256, check=power_of_two)
    kv_memory: int | None = option(None, help="bytes of KV, or auto", parse=parse_bytes)
    prefix_caching: bool = option(True, help="keep blocks")
    transports: tuple[str, ...] = option(("shm", "grpc"), help="transports", choices=("shm", "grpc"))
    mode: Mode = option(Mode.AUTO, help="mode")
    rate: float = option(0.5, help="100% is one")


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: /file\nblock-size: 4\nrate: 0.25\ntransports: [grpc]\n")
    settings = build(
        Settings,
        ["--config", str(file), "--model", "/flag", "--no-prefix-caching"],
        {"BATON_MODEL": "/env", "BATON_BLOCK_SIZE": "8", "BATON_MODE": "never"},
    )
    assert settings == Settings(Path("/flag"), 8, None, False, ("grpc",), Mode.NEVER, 0.25)


def test_an_unknown_key_in_the_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: x\nblocksize: 4\n")
    with pytest.raises(ConfigError, match="unknown key blocksize"):
        build(Settings, ["--config", str(file)], {})


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build(Settings, ["--model", "x", "--blocksize", "4"], {})
    assert "--blocksize" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model is required"),
        (["--model", "x", "--block-size", "0"], "--block-size: block_size = '0': must be at least 1"),
        (["--model", "x", "--block-size", "512"], "must be at most 256"),
        (["--model", "x", "--block-size", "3"], "must be a power of two"),
        (["--model", "x", "--block-size", "x"], "block_size = 'x'"),
        (["--model", "x", "--transports", "shm,rdma"], "must be one of shm, grpc"),
        (["--model", "x", "--mode", "maybe"], "must be one of auto, never"),
    ],
)
def test_a_wrong_value_is_told_its_field_value_and_limit(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Settings, argv, {})
    assert message in str(caught.value)


def test_a_variable_that_is_wrong_names_the_variable() -> None:
    with pytest.raises(ConfigError, match="variable BATON_PREFIX_CACHING: prefix_caching = 'perhaps'"):
        build(Settings, ["--model", "x"], {"BATON_PREFIX_CACHING": "perhaps"})


def test_load_prints_the_mistake_and_exits_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        load(Settings, prog="p", argv=["--model", "x", "--rate", "fast"])
    assert exited.value.code == 2
    assert "p: error: --rate: rate = 'fast'" in capsys.readouterr().err


def test_help_shows_limits_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build(Settings, ["--help"], {})
    text = " ".join(capsys.readouterr().out.split())
    assert "tokens per block, 1 to 256 (default: 16)" in text
    assert "--no-prefix-caching" in text


@pytest.mark.parametrize(
    ("text", "value"), [("4096", 4096), ("1KiB", 1024), ("1.5GiB", 1610612736), ("256Mi", 268435456)]
)
def test_bytes_are_read_with_binary_suffixes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


def test_one_of_several_or_auto_is_read_and_others_are_told_which_there_are() -> None:
    class Colour(Enum):
        RED = "red"
        BLUE = "blue"

    parse = one_of_or_auto(Colour)
    assert [parse(text) for text in ("auto", "red", "Blue")] == [None, Colour.RED, Colour.BLUE]
    with pytest.raises(ValueError, match=r"^must be one of auto, red, blue$"):
        parse("green")


def test_addresses_are_host_and_port() -> None:
    assert parse_address("127.0.0.1:0") == ("127.0.0.1", 0)
    assert parse_address("[::1]:80") == ("::1", 80)
    for wrong in ("127.0.0.1", ":80", "h:99999", "h:x"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            parse_address(wrong)
