"""A run folder is whole or absent, has one live owner, and holds no secrets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from iopo.redact import redact
from iopo.training.launch.run_folder import (
    describe_environment,
    mark_complete,
    open_run,
    read_complete,
)
from iopo.training.report import sweep

ROOT = Path(__file__).parents[2]


def open_and_close(run_dir: Path, config: str = "a: 1\n", environment: dict | None = None) -> None:
    with open_run(run_dir, config_text=config, environment=environment or {}):
        pass


def test_a_new_folder_appears_with_its_files_and_nothing_beside_it(tmp_path):
    with open_run(tmp_path / "runs" / "a", config_text="a: 1\n", environment={"host": "h"}):
        run_dir = tmp_path / "runs" / "a"
        assert (run_dir / "config.yaml").read_text() == "a: 1\n"
        assert json.loads((run_dir / "environment.json").read_text()) == [{"host": "h"}]
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["a"]


def test_a_live_run_is_refused_by_pid_and_a_killed_one_is_not(tmp_path):
    program = (
        "import sys, time; from pathlib import Path\n"
        "from iopo.training.launch.run_folder import open_run\n"
        f"with open_run(Path({str(tmp_path / 'a')!r}), config_text='', environment={{}}):\n"
        "    print('held', flush=True); time.sleep(99)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    assert owner.stdout is not None and owner.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f"in use by a live run .pid {owner.pid} "):
        open_and_close(tmp_path / "a")
    owner.kill()
    owner.wait()
    open_and_close(tmp_path / "a")


def test_a_second_open_in_the_same_process_is_refused(tmp_path):
    with open_run(tmp_path / "a", config_text="", environment={}):
        with pytest.raises(ValueError, match=f"pid {os.getpid()}"):
            open_and_close(tmp_path / "a")


def test_reopening_keeps_earlier_configs_and_attempts_and_clears_the_verdict(tmp_path):
    open_and_close(tmp_path / "a", "lr: 1\n", {"n": 1})
    (tmp_path / "a" / "FAILED").write_text("why")
    (tmp_path / "a" / "errors").mkdir()
    (tmp_path / "a" / "errors" / "rank-0.txt").write_text("why")
    mark_complete(tmp_path / "a", {"step": 7})
    assert read_complete(tmp_path / "a") == {"step": 7}
    open_and_close(tmp_path / "a", "lr: 2\n", {"n": 2})
    assert read_complete(tmp_path / "a") is None
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.1.yaml",
        "config.yaml",
        "environment.json",
        "lock",
    ]
    assert (tmp_path / "a" / "config.1.yaml").read_text() == "lr: 1\n"
    assert json.loads((tmp_path / "a" / "environment.json").read_text()) == [{"n": 1}, {"n": 2}]


def test_a_folder_of_other_things_is_refused_and_hydras_own_is_not(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(ValueError, match="not a run folder: it holds chapter.tex"):
        open_and_close(tmp_path / "thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    (tmp_path / "job" / ".hydra").mkdir(parents=True)
    (tmp_path / "job" / "train.log").touch()
    open_and_close(tmp_path / "job")


def test_a_sweep_counts_runs_and_not_what_wandb_writes_into_them(tmp_path):
    open_and_close(tmp_path / "a")
    files = tmp_path / "a" / "wandb" / "offline-run-1" / "files"
    files.mkdir(parents=True)
    (files / "config.yaml").write_text("a: {value: 1}\n")
    assert [row["run"] for row in sweep.collect(tmp_path)] == ["a"]


def test_an_unwritable_place_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        open_and_close(tmp_path / "file" / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- secrets ----------------------------------------------------------------------------------

PLANTED = {"WANDB_API_KEY": "0123456789abcdef0123", "MY_SERVICE_TOKEN": "correct horse battery"}


def test_planted_secrets_reach_no_file(tmp_path, monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "+judge.api_key=abcdefghijk", f"note={PLANTED['WANDB_API_KEY']}"]
    )
    config = f"judge:\n  password: pass-word-1\n  url: http://u:{PLANTED['MY_SERVICE_TOKEN']}@h/\n"
    open_and_close(tmp_path / "a", config, describe_environment(ROOT))
    secrets = [*PLANTED.values(), "abcdefghijk", "pass-word-1"]
    for path in (tmp_path / "a").iterdir():
        assert not [s for s in secrets if s in path.read_text()], path
    text = (tmp_path / "a" / "environment.json").read_text()
    assert "note=<redacted:WANDB_API_KEY>" in text and json.loads(text)[0]["packages"]["torch"]


def test_a_broken_package_among_others_does_not_end_the_record(tmp_path, monkeypatch):
    """Its dist-info holds no METADATA, as an interrupted pip leaves it."""
    (tmp_path / "broken-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    packages = describe_environment(ROOT)["packages"]
    assert packages["torch"] and "wandb" in packages and None not in packages.values()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("key sk-abcdefghijklmnop1234", "key <redacted>"),
        ("hf_abcdefghijklmnopqrst", "<redacted>"),
        ("Authorization: Bearer abc.def.ghi", "Authorization: Bearer <redacted>"),
        ("https://me:pa55@host/x", "https://me:<redacted>@host/x"),
        ('{"api_key": "abc", "n": 1}', '{"api_key": "<redacted>", "n": 1}'),
        ("hub_token=abc x=1", "hub_token=<redacted> x=1"),
    ],
)
def test_secrets_by_shape_and_by_name(text, expected):
    assert redact(text, {}) == expected


@pytest.mark.parametrize(
    "text",
    [
        "max_prompt_tokens: 2048",
        "pad_token: <|endoftext|>",
        "api_key_env: OPENAI_API_KEY",
        "api_key: null",
        "password: ${oc.env:PW}",
        "tokenizer: qwen2",
        "http://host:8000/v1",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text, {"TOKENIZER_PATH": "tokenizer: qwen2", "HF_TOKEN": "null"}) == text


def test_the_longer_of_two_nested_secrets_goes_whole():
    environ = {"A_KEY": "abcdefgh", "B_KEY": "abcdefgh-ijkl"}
    assert redact("x abcdefgh-ijkl y abcdefgh", environ) == "x <redacted:B_KEY> y <redacted:A_KEY>"
