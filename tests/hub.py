"""A small stand-in for the Hugging Face hub, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Files = dict[str, bytes]
TOKEN = "hf_right"


class Hub:
    """What it holds: by repository and commit, its files."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Files]] = {}  # commits in their order
        self.branches: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []  # method and path of each request

    def commit(self, repo: str, files: Files, branch: str = "main") -> str:
        commits = self.repos.setdefault(repo, {})
        sha = hashlib.sha1(f"{repo}{len(commits)}".encode()).hexdigest()
        commits[sha] = files
        self.branches.setdefault(repo, {})[branch] = sha
        return sha

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any, str, str]:
        """Status, body, commit and what is wrong, of a request."""
        parts = path.partition("?")[0].strip("/").split("/")
        if method == "POST" or parts == ["api", "whoami-v2"]:
            if token != TOKEN:
                return 401, {"error": "Invalid user token."}, "", ""
            if parts[1] == "whoami-v2":
                return 200, {"name": "me", "type": "user"}, "", ""
            if parts[1:3] == ["repos", "create"]:
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                if name.startswith("other/"):
                    return 403, {"error": "You don't have the rights"}, "", ""
                fresh = name not in self.repos
                if fresh:  # otherwise its visibility stays, whatever was asked for
                    self.private[name] = asked.get("visibility") == "private"
                    self.commit(name, {})
                return 200 if fresh else 409, {"url": f"https://huggingface.co/{name}"}, "", ""
            if parts[1] == "validate-yaml":
                return 200, {"errors": [], "warnings": []}, "", ""
            repo, what, branch = "/".join(parts[2:4]), parts[4], parts[5]
            if what == "branch":
                self.branches[repo].setdefault(branch, self.branches[repo]["main"])
                return 200, {}, "", ""
            if what == "preupload":
                return 200, {"files": [{"path": f["path"], "uploadMode": "regular",
                                        "shouldIgnore": False}
                                       for f in json.loads(body)["files"]]}, "", ""
            lines = [json.loads(line) for line in body.splitlines()]
            new = {v["value"]["path"]: base64.b64decode(v["value"]["content"]) for v in lines
                   if v["key"] == "file"}
            sha = self.commit(repo, self.repos[repo][self.branches[repo][branch]] | new, branch)
            return 200, {"commitUrl": f"https://huggingface.co/{repo}/commit/{sha}",
                         "commitOid": sha, "success": True}, "", ""
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        rest = parts[4:] if api else parts[2:]  # revision/REV, or resolve/REV/FILE
        if repo not in self.repos or (self.private.get(repo) and token != TOKEN):
            return 404, {"error": "Repository not found"}, "", "RepoNotFound"
        branch = rest[1] if len(rest) > 1 else "main"
        sha = self.branches[repo].get(branch, branch)
        files = self.repos[repo].get(sha)
        if files is None:
            return 404, {"error": "Invalid rev id"}, "", "RevisionNotFound"
        if api and rest[:1] == ["tree"]:
            return 200, [{"type": "file", "path": f, "size": len(c), "oid": "0" * 40}
                         for f, c in files.items()], sha, ""
        if api:
            return 200, {"id": repo, "sha": sha, "private": self.private.get(repo, False),
                         "siblings": [{"rfilename": f} for f in files]}, sha, ""
        name = "/".join(rest[2:])
        return (200, files[name], sha, "") if name in files else (404, {}, sha, "EntryNotFound")


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            hub.asked.append(f"{self.command} {self.path}")
            status, found, sha, wrong = hub.answer(self.command, self.path, body, token)
            content = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            for key, value in {
                    "Content-Length": str(len(content)), "X-Error-Code": wrong,
                    "X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}.items():
                if value:
                    self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = reply  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


@contextmanager
def connected(hub: Hub, cache: Any, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub in the place of huggingface.co, with an empty cache; somebody is logged in."""
    with serve(hub) as url:
        constants = "huggingface_hub.constants."
        patch.setattr(constants + "ENDPOINT", url)
        patch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE",
                      url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants + "HF_HUB_CACHE", str(cache))
        patch.setattr(constants + "HF_HUB_OFFLINE", False)
        patch.setattr(sys.modules["unislu_llm.weights.resolve"], "_fetched", {})
        patch.setenv("HF_TOKEN", TOKEN)
        yield hub
