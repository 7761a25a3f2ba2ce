"""The server of a round: started for one checkpoint, checked, watched, ended with its children."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_models import tiny_llama

from iopo.evaluation.config import ModelSection
from iopo.rounds import server, stage
from iopo.rounds.config import Round, RoundsConfig
from iopo.rounds.server import ServerFailed, serving

# Serves /v1/models; arguments: port, id, root, then what else it does.
STUB = """
import http.server, json, os, signal, subprocess, sys, time
port, name, root, what = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
if what == "dies": sys.exit("CUDA out of memory")
if what == "hangs": time.sleep(600)
if what == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(sys.argv[5], "w").write(f"{os.getpid()} {child.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        data = json.dumps({"data": [{"id": name, "root": root}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_POST(self): os._exit(3)
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def command(tmp_path: Path, name: str, root: str, what: str = "serves", *more: str) -> str:
    (tmp_path / "stub.py").write_text(STUB)
    return " ".join([sys.executable, str(tmp_path / "stub.py"), "{port}", name, root, what, *more])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("names", ["{model} -", "policy {model}"])
def test_the_model_is_known_by_its_id_or_by_its_folder(tmp_path, names):
    model, (name, root) = tmp_path / "export", names.split()
    with serving(command(tmp_path, name, root), str(model), tmp_path, 60) as (url, served):
        assert served == ("policy" if name == "policy" else str(model))
        assert url.startswith("http://127.0.0.1:")
        pid = json.loads((tmp_path / "server.json").read_text())["pid"]
        assert alive(pid)
    assert not alive(pid) and not (tmp_path / "server.json").exists()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("dies", r"died \(exit code 1\): it ended before it answered\n.*\n.*CUDA out of memory"),
        ("hangs", r"did not answer .*/v1/models within 1 s \(rounds.serve_timeout_s\)"),
        ("serves", r"serves another model: found other \(/else\), expected /models/mine"),
    ],
)
def test_a_server_that_dies_hangs_or_serves_another_model_is_named(tmp_path, what, message):
    words = command(tmp_path, "other", "/else", what)
    with (
        pytest.raises(ServerFailed, match=message),
        serving(words, "/models/mine", tmp_path, 1 if what == "hangs" else 60),
    ):
        pass
    assert not (tmp_path / "server.json").exists()


def test_a_server_that_dies_while_it_is_used_is_named(tmp_path):
    words = command(tmp_path, "{model}", "-")
    with (
        pytest.raises(
            ServerFailed, match=r"the server of mine died \(SIGKILL\): connection failed"
        ),
        serving(words, "mine", tmp_path, 60),
    ):
        os.kill(json.loads((tmp_path / "server.json").read_text())["pid"], signal.SIGKILL)
        time.sleep(0.2)
        raise RuntimeError("connection failed")


def test_a_sampling_stage_names_the_server_that_died_under_it(tmp_path, capsys):
    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)
    section = RoundsConfig(
        prompts_per_round=1, samples=2, serve=command(tmp_path, "{model}", "-"), serve_timeout_s=60
    )
    folder = tmp_path / "round-01"
    Round(str(folder), 1, "pair", 0, ModelSection(str(model)), None, section).write()
    assert stage.main(["sample", str(folder)]) == 1
    said = capsys.readouterr().err
    assert f"sample: the server of {model} died (exit code 3): " in said
    assert not (folder / "sample/done.json").exists()


def test_a_command_that_is_not_there_is_named(tmp_path):
    with (
        pytest.raises(ServerFailed, match="rounds.serve: no-such-program cannot be started"),
        serving("no-such-program {model} {port}", "mine", tmp_path, 60),
    ):
        pass


def test_what_ignores_sigterm_is_killed_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "STOP_S", 0.5)
    note = tmp_path / "pids"
    with serving(command(tmp_path, "{model}", "-", "stubborn", str(note)), "m", tmp_path, 60):
        pids = [int(pid) for pid in note.read_text().split()]
        assert all(map(alive, pids))
    assert not any(map(alive, pids))


def test_the_server_of_a_killed_stage_is_ended_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "STOP_S", 0.5)
    note = tmp_path / "pids"
    words = command(tmp_path, "{model}", "-", "stubborn", str(note))
    code = (
        "import sys, time; from pathlib import Path; from iopo.rounds.server import serving\n"
        f"with serving({words!r}, 'm', Path({str(tmp_path)!r}), 60): time.sleep(600)"
    )
    stage = subprocess.Popen([sys.executable, "-c", code])
    while not note.exists() or not note.read_text():
        time.sleep(0.05)
    time.sleep(0.3)
    stage.kill()
    stage.wait()
    left = [int(pid) for pid in note.read_text().split()]
    assert alive(left[0]), "it ignores the signal that it gets when the stage ends"
    with serving(command(tmp_path, "{model}", "-"), "m", tmp_path, 60):
        assert not any(map(alive, left))


def test_a_number_that_another_process_has_by_now_is_left_alone(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (tmp_path / "server.json").write_text(json.dumps({"pid": other.pid, "since": 1}))
    with serving(command(tmp_path, "{model}", "-"), "m", tmp_path, 60):
        assert alive(other.pid)
    other.kill()
    other.wait()
