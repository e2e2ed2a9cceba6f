"""The command line: what it imports, what it says when asked wrongly, and the doctor's verdicts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton import doctor
from baton.cli import app
from baton.doctor import Finding, Verdict
from baton.local import commands
from baton.local.control import ControlError, ProcessView, Verb, parse_command
from baton.local.errors import NotRunning
from baton.local.logfiles import rotate, tail
from baton.local.model import LineProgress
from baton.local.plan import MIB, Machine
from baton.local.probe import FirstToken
from baton.local.reporter import PlainReporter, Ready, banner
from baton.local.rundir import RunDir, known_runs, state_dir, take_lock
from baton.local.service_file import Overrides, ServiceFileError, load_service
from modelfiles.progress import Progress, Stage

HEAVY = {"torch", "transformers", "grpc", "numpy", "rich", "pydantic", "psutil", "asyncio", "tokenizers", "uvicorn"}


def view(worker_id: str, state: str = "ready", **other: object) -> ProcessView:
    fields: dict[str, object] = {
        "worker_id": worker_id, "role": worker_id.partition("-")[0], "state": state, "pid": 7, "uptime_s": 3.2,
        "num_restarts": 0, "phase": "", "percent": 100.0, "threads": 1, "kv_bytes": 512 * MIB, "http": "127.0.0.1:1",
        "transports": (), "log": "",
    }  # fmt: skip
    return ProcessView(**(fields | other))  # pyright: ignore[reportArgumentType]


def test_ps_shows_by_which_ways_kv_comes_to_a_worker() -> None:
    table = commands.render_table((view("prefill-0"), view("decode-0", transports=("nixl", "grpc"))))
    assert "TRANSPORT" in table.splitlines()[0]
    assert "nixl, grpc" in table.splitlines()[2]


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("up", "ps", "scale", "logs", "down", "pull", "plan", "export", "doctor", "version"):
        assert command in result.output
    summaries = result.output.partition("Commands:")[2]
    assert "..." not in summaries, "one is cut off: a docstring's first line is too long"


def test_without_a_terminal_a_fetch_says_a_line_a_second_and_a_quick_check_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    show = LineProgress("smollm2", clock=lambda: now)
    for tenth in range(11):
        show(Progress(Stage.VERIFY, tenth, 10))
        now += 0.05
    assert capsys.readouterr().err == ""
    for tenth in range(11):
        show(Progress(Stage.DOWNLOAD, tenth, 10))
        now += 0.5
    assert capsys.readouterr().err.splitlines() == [f"smollm2: download {percent}%" for percent in range(10, 101, 20)]


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import baton.cli, sys; print(*(name for name in sys.modules if '.' not in name))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not HEAVY & set(said.stdout.split())


def test_a_port_out_of_range_is_refused_with_the_limit() -> None:
    result = CliRunner().invoke(app, ["up", "--port", "70000"])
    assert result.exit_code == 2
    assert "less than or equal to 65535" in result.output


def test_version_is_the_projects() -> None:
    result = CliRunner().invoke(app, ["version"])
    assert result.output.count(".") == 2


def test_without_a_service_commands_say_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_RUN_DIR", str(tmp_path))
    for call in (lambda: commands.find_run(None), lambda: commands.show_processes("chat", as_json=False)):
        with pytest.raises(NotRunning, match="start one with `baton up`"):
            call()


def test_with_several_services_the_name_must_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_RUN_DIR", str(tmp_path))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "control").touch()
    with pytest.raises(NotRunning, match=r"--name one\|two"):
        commands.find_run(None)
    assert commands.find_run("two").name == "two"
    (tmp_path / "two" / "control").unlink()
    assert commands.find_run(None).name == "one"
    assert [run.name for run in known_runs(tmp_path)] == ["one"]


def test_the_table_has_one_row_a_process_and_says_what_a_starting_one_does() -> None:
    table = commands.render_table(
        (view("gateway", threads=None, kv_bytes=None), view("decode-0", "starting", phase="weights", percent=40.0))
    )
    header, gateway, decode = table.splitlines()
    assert header.split() == ["PROCESS", "STATE", "PID", "UPTIME", "RESTARTS", "THREADS", "KV", "TRANSPORT", "HTTP"]
    assert gateway.split() == ["gateway", "ready", "7", "3", "s", "0", "-", "-", "-", "127.0.0.1:1"]
    assert "starting: weights 40%" in decode
    assert "512 MiB" in decode


def test_plain_progress_prints_a_line_for_each_change_only(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = PlainReporter(started_at=0.0)
    for percent in (10.0, 20.0, 30.0):
        reporter.update([view("decode-0", "starting", phase="weights", percent=percent)])
    reporter.update([view("decode-0")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("] ")[2] for line in lines] == ["decode-0   starting: weights", "decode-0   ready"]


def test_the_banner_has_an_authorization_header_only_where_keys_are_needed() -> None:
    ready = Ready("http://127.0.0.1:8000", "tiny", 3.0, 3.25, FirstToken(" a", 0.25), needs_api_key=True)
    assert 'Bearer $API_KEY"' in banner(ready)
    assert "time to first streamed token: 3.2 s, the request's part 250 ms" in banner(ready)
    assert "Authorization" not in banner(
        Ready("http://h", "tiny", 3.0, 3.2, FirstToken(" a", 0.2), needs_api_key=False)
    )


def test_the_banner_asks_for_bounded_answers() -> None:
    said = banner(Ready("http://h", "tiny", 3.0, 3.2, None, needs_api_key=False))
    assert '"max_tokens": 128' in said
    assert ", max_tokens=128" in said


def test_the_banner_names_commands_that_can_be_typed_where_no_environment_is_active(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> str:
        return banner(Ready("http://h", "tiny", 3.0, 3.2, None, needs_api_key=False))

    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    assert f"  {folder}/python -m baton ps | " in said()
    (folder / "baton").touch(mode=0o755)
    assert "  .venv/bin/baton ps | .venv/bin/baton scale" in said()
    monkeypatch.setenv("PATH", str(folder))
    assert "  baton ps | baton scale" in said()


def test_the_banner_says_why_there_is_no_first_token() -> None:
    assert "holds digests only" in banner(Ready("http://h", "tiny", 3.0, 3.2, None, needs_api_key=True))


def test_no_file_means_the_default_service_with_the_port_of_the_command_line() -> None:
    service = load_service(None, Overrides(port=9001))
    assert service.spec.model.source == "smollm2"
    assert service.spec.gateway.port == 9001


def test_device_and_kernels_of_the_command_line_win_over_the_files(tmp_path: Path) -> None:
    file = tmp_path / "chat.yaml"
    file.write_text(
        "apiVersion: serving.baton.dev/v1alpha1\nkind: LLMService\nspec: {engine: {kernels: native, device: cpu}}\n"
    )
    engine = load_service(file, Overrides(kernels="triton")).spec.engine
    assert (engine.kernels, engine.device) == ("triton", "cpu")
    engine = load_service(file, Overrides(kernels="auto", device="auto")).spec.engine
    assert (engine.kernels, engine.device) == (None, None)


def test_paths_in_the_file_are_relative_to_it(tmp_path: Path) -> None:
    file = tmp_path / "chat.yaml"
    file.write_text("apiVersion: serving.baton.dev/v1alpha1\nkind: LLMService\nspec: {gateway: {apiKeysFile: keys}}\n")
    with pytest.raises(ServiceFileError, match=r"apiKeysFile = 'keys': there is no .*keys"):
        load_service(file, Overrides())
    (tmp_path / "keys").touch()
    assert load_service(file, Overrides()).spec.gateway.api_keys_file == str(tmp_path / "keys")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "is not YAML"),
        ("kind: Pod\n", "apiVersion missing"),
        ("", "expected an"),
        ("spec:\n  pools:\n  - replicas: 1\n    replicas: 2\n", "line 4: 'replicas' is stated twice"),
    ],
)
def test_a_file_that_is_no_service_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "chat.yaml"
    file.write_text(text)
    with pytest.raises(ServiceFileError, match=words):
        load_service(file, Overrides())
    with pytest.raises(ServiceFileError, match="cannot read"):
        load_service(tmp_path / "other.yaml", Overrides())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[]", "object"),
        (b"{", "one line of JSON"),
        (b'{"verb": "ps", "x": 1}', "unknown key x"),
        (b'{"verb": "scale", "replicas": true}', "whole number"),
        (b'{"verb": "scale", "pool": 3}', "string"),
        (b'{"verb": ["ps"]}', "known: ps, scale, down"),
    ],
)
def test_what_is_no_command_is_refused(line: bytes, words: str) -> None:
    with pytest.raises(ControlError, match=words):
        parse_command(line)
    assert parse_command(b'{"verb": "scale", "pool": "decode", "replicas": 2}').verb is Verb.SCALE


def test_the_state_folder_is_the_variables_or_the_users(tmp_path: Path) -> None:
    assert state_dir({"BATON_RUN_DIR": str(tmp_path)}) == tmp_path
    assert state_dir({"XDG_STATE_HOME": "/x"}) == Path("/x/baton")
    assert state_dir({}) == Path.home() / ".local/state/baton"


def test_a_prepared_run_has_a_secret_that_only_its_owner_reads_and_cleaning_keeps_the_logs(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "chat")
    take_lock(run, patience_s=0.0)
    run.prepare()
    assert run.secret.stat().st_mode & 0o777 == 0o600
    assert len(run.secret.read_text()) >= 32
    first = run.secret.read_text()
    run.prepare()
    assert run.secret.read_text() != first
    run.log_of("gateway").write_text("hello\n")
    run.clean()
    assert [path.name for path in run.path.iterdir()] == ["logs"]
    assert tail(run.log_of("gateway"), 5) == "hello"


def test_a_new_run_begins_its_logs_anew_and_keeps_those_of_the_run_before(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for number in (1, 2, 3):
        run.prepare()
        assert tail(run.log_of("decode-0"), 9) == ""
        run.log_of("decode-0").write_text(f"run {number}\n")
    assert tail(run.log_of("decode-0"), 9) == "run 3"
    assert run.log_of("decode-0").with_suffix(".log.1").read_text() == "run 2\n"


def test_a_log_that_has_grown_too_long_is_cut_and_its_writer_goes_on_at_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "decode-0.log"
    with open(path, "a") as writer:
        writer.write("x" * 100 + "\n")
        writer.flush()
        rotate(tmp_path, max_bytes=200)
        assert path.stat().st_size == 101
        rotate(tmp_path, max_bytes=100)
        writer.write("after\n")
    assert path.read_text() == "after\n"
    assert (tmp_path / "decode-0.log.1").stat().st_size == 101


def test_only_what_up_cannot_do_without_makes_the_doctor_fail(capsys: pytest.CaptureFixture[str]) -> None:
    fine = Finding("torch", Verdict.OK, "2.13", fix="unsaid")
    optional = Finding("GPU", Verdict.OPTIONAL, "none", fix="none is needed")
    missing = Finding("memory", Verdict.MISSING, "10 MiB", fix="free some")
    assert doctor.report([fine, optional]) == 0
    assert doctor.report([fine, missing]) == 1
    said = capsys.readouterr().out
    assert "fix: free some" in said
    assert "unsaid" not in said


def test_the_doctor_sees_a_taken_port_and_a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        finding = doctor.check_port(other.getsockname()[1])
    assert finding.verdict is Verdict.MISSING
    assert "--port" in finding.fix
    monkeypatch.setattr(doctor, "read_machine", lambda: Machine(1.0, 256 * MIB, "cgroup quota, cgroup limit"))
    assert doctor.check_memory().verdict is Verdict.MISSING
    assert doctor.check_cpus().verdict is Verdict.OPTIONAL


@pytest.mark.parametrize(
    ("status", "out", "err", "verdict", "words"),
    [
        (0, "rc_mlx5/mlx5_0:1\ntcp/eth0\n", "", Verdict.OK, "UCX sees rc_mlx5/mlx5_0:1 tcp/eth0"),
        (1, "", "Traceback ...\nNIXL is not installed: ...\n", Verdict.OPTIONAL, "NIXL is not installed: ..."),
        (-11, "", "", Verdict.OPTIONAL, "UCX ended with -11"),
    ],
    ids=["there", "missing", "crashes"],
)
def test_the_doctor_lists_what_ucx_sees_or_says_why_nothing(
    monkeypatch: pytest.MonkeyPatch, status: int, out: str, err: str, verdict: Verdict, words: str
) -> None:
    done = subprocess.CompletedProcess(["ucx"], status, out, err)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: done)
    finding = doctor.check_nixl()
    assert (finding.verdict, finding.found) == (verdict, words)


def test_every_line_of_the_doctor_has_a_fix_unless_all_is_well() -> None:
    findings = doctor.examine(port=1)
    assert len(findings) == 12
    assert all(finding.fix for finding in findings if finding.verdict is not Verdict.OK)
