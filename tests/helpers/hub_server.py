"""A small server with the part of the Hugging Face Hub's interface that uploads and downloads of small files use."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 40
TOKEN = "hf_valid"


class Handler(BaseHTTPRequestHandler):
    """Holds repositories in memory, `private/…` of which and all writing need `TOKEN`."""

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def is_logged_in(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_GET(self):
        if self.path == "/":
            return self.answer(200)
        _, owner, name, *rest = self.path.split("?")[0].split("/")
        files = self.server.repositories.get(f"{owner}/{name}")
        if files is None or (owner == "private" and not self.is_logged_in):
            return self.answer(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if rest[:1] == ["resolve"] and rest[-1] in files:
            content = files[rest[-1]]
            return self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET  # noqa: N815 (the server's own name)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.is_logged_in:
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/validate-yaml":  # of the model card
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            repository = "{organization}/{name}".format(**json.loads(body))
            self.server.repositories.setdefault(repository, {})
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{repository}", "id": repository})
        repository = "/".join(self.path.split("/")[3:5])
        address = f"http://{self.headers['Host']}/{repository}"
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.answer(200, {"files": modes})
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[repository][line["value"]["path"]] = content
        return self.answer(200, {"commitUrl": f"{address}/commit/{COMMIT}", "commitOid": COMMIT})

    def log_message(self, *_):
        pass


@contextmanager
def hub_server():
    """Serve repositories: yields the address and the files by repository and name."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.repositories = {}
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", server.repositories
        server.shutdown()
        thread.join()
