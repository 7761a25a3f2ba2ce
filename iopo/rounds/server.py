"""A server for one checkpoint: started, waited for, checked to serve it, and stopped again."""

import ctypes
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from iopo.files import write_text
from iopo.progress import progress
from iopo.redact import redact

STOP_S = 20.0  # from SIGTERM to SIGKILL
LAST_LINES = 15  # of the server's log, in messages
_PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


class ServerFailed(RuntimeError):
    """The server died, did not start in time, or serves another model."""


@contextmanager
def serving(command: str, model: str, folder: Path, timeout_s: float) -> Iterator[tuple[str, str]]:
    """Run the server's command for `model` and yield (base_url, the name it serves it under).

    command: with {model} and {port}; the port is a free one. folder: of server.log and server.json.
    timeout_s: for the start. Whatever happens, the server and what it started are ended, by SIGTERM
    and then by SIGKILL; one that a killed process left behind is ended first.
    Raises ServerFailed, which names what happened and the end of the log.
    """
    _end_left_over(folder / "server.json")
    port = _free_port()
    words = [word.format(model=model, port=port) for word in shlex.split(command)]
    output = folder / "server.log"
    log.info("starting %s", redact(shlex.join(words)))
    try:
        with output.open("wb") as file:
            process = subprocess.Popen(
                words, stdout=file, stderr=file, start_new_session=True, preexec_fn=_end_with_parent
            )
    except OSError as error:
        raise ServerFailed(f"rounds.serve: {words[0]} cannot be started: {error}") from error
    write_text(
        folder / "server.json", json.dumps({"pid": process.pid, "since": _since(process.pid)})
    )
    try:
        name = _await(process, f"http://127.0.0.1:{port}/v1", model, timeout_s)
        log.info("%s is served as %s on port %d", model, name, port)
        yield f"http://127.0.0.1:{port}/v1", name
    except Exception as error:
        code = process.poll()
        how = "" if code is None else f"the server of {model} died ({_named(code)}): "
        raise ServerFailed(f"{how}{error}\n{output} ends:\n{_tail(output)}") from error
    finally:
        _end(process.pid, process)
        (folder / "server.json").unlink(missing_ok=True)


def _await(process: subprocess.Popen[bytes], url: str, model: str, timeout_s: float) -> str:
    """The name of the model, once the server lists it."""
    end = time.monotonic() + timeout_s
    with progress(None, f"waiting for the server of {model}"):
        while process.poll() is None:
            found = _listed(f"{url}/models")
            if found is not None:
                return _name_of(model, found)
            if time.monotonic() > end:
                raise ServerFailed(
                    f"the server did not answer {url}/models within {timeout_s:g} s "
                    "(rounds.serve_timeout_s)"
                )
            time.sleep(0.2)
    raise ServerFailed("it ended before it answered")


def _listed(url: str) -> list[dict[str, Any]] | None:
    """What the server says it serves; None while it does not answer."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return list(json.load(reply)["data"])
    except (OSError, ValueError, KeyError, TypeError):  # also: no HTTP yet, or no JSON
        return None


def _name_of(model: str, found: list[dict[str, Any]]) -> str:
    """The id of the model among those that are served, by its id or by its folder."""
    for row in found:
        root = str(row.get("root") or "")
        if model in (row.get("id"), root) or (
            root and Path(root).resolve() == Path(model).resolve()
        ):
            return str(row["id"])
    shown = ", ".join(f"{row.get('id')} ({row.get('root')})" for row in found) or "no model"
    raise ServerFailed(f"the server serves another model: found {shown}, expected {model}")


def _end(group: int, process: subprocess.Popen[bytes] | None = None) -> None:
    """End a process group, whose number is that of its first process."""
    for number, patience_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.killpg(group, number)
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            if process is not None:
                process.poll()  # else it stays in the table, and the group with it
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


def _end_left_over(note: Path) -> None:
    """End the server of a stage that was killed, if it is the process that was started."""
    if not note.exists():
        return
    left = json.loads(note.read_text())
    if _since(left["pid"]) == left["since"] is not None:
        log.info("ending the server that a killed stage left behind, process %d", left["pid"])
        _end(left["pid"])
    note.unlink()


def _since(pid: int) -> int | None:
    """When a process started, in ticks since the machine did: its number may be used again."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _named(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])
