"""The supervisor with real processes that are small fakes: restarts, commands, and that nothing is ever left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from baton.local.control import Command, Verb, send_command
from baton.local.errors import ControlError
from baton.local.rundir import RunDir
from bench.ports import free_port

pytestmark = pytest.mark.timeout(300)

PATIENCE_S = 60.0  # of waits that end early when all is well
ROOT = Path(__file__).parents[2]
FAKES = Path(__file__).parent / "fakes"
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip


def eventually(is_so: Callable[[], bool], what: str, *, within_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.02)


class Home:
    """One state folder and what runs in it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.state = folder / "state"
        self.port = free_port()
        self.file = folder / "service.yaml"
        self.faults: dict[str, str] = {}
        self.started: list[subprocess.Popen[str]] = []
        self.write(model={"source": str(model), "name": "tiny"}, gateway={"port": self.port})

    @property
    def run(self) -> Path:
        return self.state / "chat"

    def write(self, **spec: Any) -> None:
        document = {"apiVersion": "serving.baton.dev/v1alpha1", "kind": "LLMService", "metadata": {"name": "chat"}}
        self.file.write_text(yaml.safe_dump(document | {"spec": spec}))

    def environment(self) -> dict[str, str]:
        paths = (FAKES, ROOT, ROOT / "operator")
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths),
            "BATON_RUN_DIR": str(self.state),
            "FAKE_FAULTS": json.dumps(self.faults),
        }

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "baton", *arguments]

    def baton(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.environment(), capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip

    def up(self) -> subprocess.Popen[str]:
        """Start in the foreground and return once it says that it answers."""
        supervisor = self.begin_up()
        said: list[str] = []
        assert supervisor.stdout is not None
        for line in supervisor.stdout:
            said.append(line)
            if "Ctrl-C stops everything" in line:
                return supervisor
        raise AssertionError("".join(said))

    def begin_up(self, *options: str) -> subprocess.Popen[str]:
        supervisor = subprocess.Popen(
            self.command("up", "-f", str(self.file), *options), env=self.environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.started.append(supervisor)
        return supervisor

    def processes(self) -> dict[str, dict[str, Any]]:
        answer = self.baton("ps", "--json")
        assert answer.returncode == 0, answer.stderr
        return {view["worker_id"]: view for view in json.loads(answer.stdout)["processes"]}

    def leftovers(self) -> list[str]:
        """Processes of this home, its files but logs, and its port if somebody listens there."""
        left = [f"process {pid}" for pid in self.pids()]
        left += [str(path) for path in self.run.rglob("*") if path.is_file() or path.is_socket()]
        left = [item for item in left if not item.startswith(str(self.run / "logs"))]
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                left.append(f"port {self.port}")
        return left

    def pids(self) -> list[int]:
        found: list[int] = []
        for process in psutil.process_iter():
            try:
                if (
                    process.environ().get("BATON_RUN_DIR") == str(self.state)
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process.pid)
            except (psutil.Error, OSError):
                continue
        return found


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    model = tmp_path / "model"  # sizes are all that planning reads; the fakes load nothing
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL_CONFIG))
    made = Home(tmp_path, model)
    yield made
    for pid in made.pids():
        os.kill(pid, signal.SIGKILL)
    for supervisor in made.started:
        supervisor.wait(PATIENCE_S)
        if supervisor.stdout is not None:
            supervisor.stdout.close()


def test_up_shows_the_start_and_says_how_to_call_the_service(home: Home) -> None:
    supervisor = home.begin_up()
    assert supervisor.stdout is not None
    said = ""
    while "Ctrl-C stops everything" not in said:
        line = supervisor.stdout.readline()
        assert line, said
        said += line
    assert "decode-0   starting: fake phase" in said
    assert "threads: " in said
    assert "memory: 75% of " in said
    assert f"curl -N http://127.0.0.1:{home.port}/v1/chat/completions" in said
    assert f'OpenAI(base_url="http://127.0.0.1:{home.port}/v1"' in said
    assert "time to first streamed token: " in said


def test_a_killed_worker_is_started_again(home: Home) -> None:
    home.up()
    before = home.processes()["decode-0"]
    os.kill(before["pid"], signal.SIGKILL)

    def is_back() -> bool:
        now = home.processes()["decode-0"]
        return now["state"] == "ready" and now["pid"] not in (None, before["pid"])

    eventually(is_back, "decode-0 ready again under another pid")
    assert home.processes()["decode-0"]["num_restarts"] == 1
    assert home.processes()["prefill-0"]["num_restarts"] == 0


def test_a_worker_that_says_that_it_stands_still_is_killed_and_started_again(home: Home) -> None:
    home.faults = {"decode-0": "stalled"}
    home.up()
    eventually(lambda: home.processes()["decode-0"]["num_restarts"] >= 1, "decode-0 restarted")


def test_kill_9_of_the_supervisor_leaves_nothing_but_logs(home: Home) -> None:
    supervisor = home.up()
    assert (home.run / "secret").exists()
    supervisor.kill()
    supervisor.wait(PATIENCE_S)
    eventually(lambda: not home.leftovers(), f"nothing left, found {home.leftovers()}")
    assert (home.run / "logs" / "decode-0.log").read_text() == "decode-0 is up\n"


def test_kill_9_of_the_supervisor_ends_even_a_worker_that_will_not(home: Home) -> None:
    home.faults = {"decode-0": "deaf"}
    supervisor = home.up()
    supervisor.kill()
    supervisor.wait(PATIENCE_S)
    eventually(lambda: not home.leftovers(), "nothing left")


def test_a_new_run_follows_a_killed_one_at_once(home: Home) -> None:
    home.up().kill()
    home.up()
    assert {view["state"] for view in home.processes().values()} == {"ready"}


def test_a_new_run_cleans_up_what_a_killed_janitor_left(home: Home) -> None:
    supervisor = home.up()
    for pid in [pid for pid in home.pids() if "baton.local.janitor" in psutil.Process(pid).cmdline()]:
        os.kill(pid, signal.SIGKILL)
    supervisor.kill()
    supervisor.wait(PATIENCE_S)
    stale = home.run / "registry" / "decode-7.json"
    stale.write_text("{}")
    eventually(lambda: not home.pids(), "workers ended by themselves")
    home.up()
    assert not stale.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_supervisor_stops_everything(home: Home, number: signal.Signals) -> None:
    supervisor = home.up()
    supervisor.send_signal(number)
    assert supervisor.wait(PATIENCE_S) == 0
    assert home.leftovers() == []


def test_down_leaves_nothing_but_logs(home: Home) -> None:
    supervisor = home.up()
    answer = home.baton("down")
    assert (answer.returncode, answer.stdout) == (0, "chat is down\n")
    assert home.leftovers() == []
    assert supervisor.wait(PATIENCE_S) == 0
    assert "decode-0 is up" in home.baton("logs", "decode-0").stdout


def test_a_second_ctrl_c_does_not_wait_for_a_worker_that_will_not_drain(home: Home) -> None:
    home.faults = {"prefill-0": "deaf"}
    supervisor = home.up()
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.stdout is not None
    while "once more to stop at once" not in supervisor.stdout.readline():
        continue
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(PATIENCE_S) == 0
    assert home.leftovers() == []


def test_scale_adds_workers_and_takes_the_last_ones_away(home: Home) -> None:
    home.up()
    assert home.baton("scale", "decode", "3").stdout == "decode: 1 -> 3\n"
    assert {name for name, view in home.processes().items() if view["state"] == "ready"} == {
        "gateway", "prefill-0", "decode-0", "decode-1", "decode-2",
    }  # fmt: skip
    assert home.baton("scale", "decode", "1").returncode == 0
    assert set(home.processes()) == {"gateway", "prefill-0", "decode-0"}
    assert not (home.run / "registry" / "decode-2.json").exists()


@pytest.mark.parametrize(
    ("pool", "replicas", "words"),
    [
        ("decode", "0", "replicas = 0; decode takes 1 to 64"),
        ("decode", "65", "replicas = 65; decode takes 1 to 64"),
        ("gateway", "2", "pool = 'gateway'; known: prefill, decode"),
    ],
)
def test_scale_refuses_what_cannot_be(home: Home, pool: str, replicas: str, words: str) -> None:
    home.up()
    answer = home.baton("scale", pool, replicas)
    assert answer.returncode == 1
    assert words in answer.stderr


def test_two_services_of_one_name_are_refused(home: Home) -> None:
    home.up()
    answer = home.baton("up", "-f", str(home.file))
    assert answer.returncode == 1
    assert "a service named 'chat' is up already" in answer.stderr
    assert {view["state"] for view in home.processes().values()} == {"ready"}


def test_a_port_that_is_taken_is_said_before_anything_starts(home: Home) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", home.port))
        other.listen()
        answer = home.baton("up", "-f", str(home.file))
    assert answer.returncode == 1
    assert f"cannot listen on 127.0.0.1:{home.port}" in answer.stderr
    assert "--port" in answer.stderr
    assert home.leftovers() == []


def test_an_unknown_key_is_refused(home: Home) -> None:
    home.write(gatewey={"port": 1})
    answer = home.baton("up", "-f", str(home.file))
    assert answer.returncode == 1
    assert "spec.gatewey: unknown key; did you mean gateway?" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(("fault", "code"), [("config", 2), ("model", 78)])
def test_a_process_that_cannot_start_ends_the_start_at_once_with_its_own_words(
    home: Home, fault: str, code: int
) -> None:
    home.faults = {"decode-0": fault}
    answer = home.baton("up", "-f", str(home.file))
    assert answer.returncode == 1
    assert answer.stdout.count("ended with exit code") <= 1
    assert f"decode-0 ended with exit code {code} before it was ready" in answer.stderr
    assert answer.stderr.count("--nonsense = 7: must be at most 6") == 1, "started more than once"
    assert home.leftovers() == []


def test_a_process_that_ends_three_times_before_it_was_ready_ends_the_start(home: Home) -> None:
    home.faults = {"prefill-0": "crash"}
    answer = home.baton("up", "-f", str(home.file))
    assert answer.returncode == 1
    assert "prefill-0 ended with exit code 1 before it was ready" in answer.stderr
    assert home.leftovers() == []


def test_ctrl_c_during_the_start_leaves_nothing(home: Home) -> None:
    home.faults = {"decode-0": "stuck"}
    supervisor = home.begin_up()
    eventually(lambda: (home.run / "registry" / "decode-0.json").exists(), "decode-0 has begun")
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(PATIENCE_S) == 0
    assert home.leftovers() == []


def test_ctrl_c_while_a_detached_start_is_waited_for_leaves_nothing(home: Home) -> None:
    home.faults = {"decode-0": "stuck"}
    starting = home.begin_up("--detach")
    eventually(lambda: (home.run / "registry" / "decode-0.json").exists(), "decode-0 has begun")
    starting.send_signal(signal.SIGINT)
    assert starting.wait(PATIENCE_S) == 130
    assert home.leftovers() == []


def test_a_service_that_stops_is_not_scaled(home: Home) -> None:
    home.faults = {"prefill-0": "deaf"}
    supervisor = home.up()
    supervisor.send_signal(signal.SIGTERM)
    run = RunDir(home.run)
    eventually(lambda: send_command(run, Command(Verb.PS), timeout_s=10.0).state == "stopping", "it stops")
    with pytest.raises(ControlError, match="'chat' is stopping"):
        send_command(run, Command(Verb.SCALE, "decode", 2), timeout_s=10.0)
    supervisor.send_signal(signal.SIGTERM)  # prefill-0 would keep it for its whole drain
    assert supervisor.wait(PATIENCE_S) == 0
    assert home.leftovers() == []


def test_detach_returns_once_the_service_answers(home: Home) -> None:
    answer = home.baton("up", "-f", str(home.file), "--detach")
    assert answer.returncode == 0, answer.stderr
    assert "time to first streamed token" in answer.stdout
    assert home.baton("ps").stdout.startswith(f"chat is ready at http://127.0.0.1:{home.port}")
    assert home.baton("down").returncode == 0
    assert home.leftovers() == []


def test_logs_tell_of_the_last_run_alone(home: Home) -> None:
    for _ in range(2):
        assert home.baton("up", "-f", str(home.file), "--detach").returncode == 0
        assert home.baton("down").returncode == 0
    assert home.baton("logs", "decode-0").stdout == "decode-0 is up\n"
    assert home.baton("logs", "supervisor").stdout.count("answers at") == 1
    home.up()
    assert "supervisor" not in home.baton("logs").stdout
    assert (home.run / "logs" / "supervisor.log.1").exists()


def test_a_detached_start_that_fails_says_why(home: Home) -> None:
    home.faults = {"decode-0": "config"}
    answer = home.baton("up", "-f", str(home.file), "--detach")
    assert answer.returncode == 1
    assert "must be at most 6" in answer.stdout


def test_nonsense_on_the_control_socket_changes_nothing(home: Home) -> None:
    home.up()
    for line, words in (
        (b"hello\n", b"one line of JSON"),
        (b'{"verb": "eat"}\n', b"known: ps, scale, down"),
        (b"x" * 70000, b"bytes"),
    ):
        with socket.socket(socket.AF_UNIX) as connection:
            folder = os.open(home.run, os.O_RDONLY)
            connection.connect(f"/proc/self/fd/{folder}/control")
            os.close(folder)
            connection.sendall(line)
            assert words in connection.recv(65536)
    assert (home.run / "control").stat().st_mode & 0o777 == 0o600
    assert {view["state"] for view in home.processes().values()} == {"ready"}
