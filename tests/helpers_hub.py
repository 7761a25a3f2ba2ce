"""A Hugging Face hub for tests: data sets of one commit each, over HTTP on this machine."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


@contextmanager
def serving(sets: Mapping[tuple[str, str], Files]) -> Iterator[str]:
    """The address of a hub that has these data sets: (org/name, revision) -> path -> content."""
    commits = {key: hashlib.sha1(repr(key).encode()).hexdigest() for key in sets}
    by_commit = {(repo, commits[repo, rev]): files for (repo, rev), files in sets.items()}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            for (repo, name), files in {**sets, **by_commit}.items():
                commit = commits.get((repo, name), name)
                if path == f"/api/datasets/{repo}/revision/{name}":
                    return self.answer(json.dumps({"id": repo, "sha": commit}).encode(), commit)
                if path == f"/api/datasets/{repo}/tree/{name}":
                    tree = [
                        {"type": "file", "path": p, "size": len(c), "oid": self.etag(c)}
                        for p, c in files.items()
                    ]
                    return self.answer(json.dumps(tree).encode(), commit)
                start = f"/datasets/{repo}/resolve/{name}/"
                if path.startswith(start) and path.removeprefix(start) in files:
                    return self.answer(files[path.removeprefix(start)], commit)
            self.answer(b"{}", "", 404)

        do_HEAD = do_GET

        @staticmethod
        def etag(content: bytes) -> str:
            return hashlib.sha1(content).hexdigest()

        def answer(self, content: bytes, commit: str, status: int = 200) -> None:
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{self.etag(content)}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
