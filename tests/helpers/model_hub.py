"""The hub with one model repository that can be written to, as huggingface_hub 2 does it.

    GET  /api/whoami-v2, /api/models/{repo}[/revision/{revision}]
    POST /api/repos/create, /api/validate-yaml
    POST /api/models/{repo}/preupload/main             which files go as LFS objects: .pt, .pkl and .png
    POST /{repo}.git/info/lfs/objects/batch            where to put the objects that are not there yet
    PUT  /lfs/{sha256}                                 an object; no token is sent along
    POST /api/models/{repo}/commit/main                small files, and objects by name; makes them `files`

Whatever writes needs `token`; `refusal`, if set, is what a commit is refused with.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re

from tests.helpers.hub_server import Handler, HubServer, is_large


class ModelHandler(Handler):
    server: ModelHub

    def do_GET(self) -> None:
        if self.path.startswith("/api/whoami-v2"):
            if self._is_allowed():
                self._json({"name": "somebody", "auth": {"accessToken": {"displayName": "test"}}})
        elif self.path.startswith("/api/models/"):
            self._info()
        else:
            super().do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._is_allowed():
            return
        hub, path = self.server, self.path.split("?")[0]
        hub.calls.append(path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if hub.repo == name else 200
            if status == 200:
                hub.repo, hub.is_private = name, asked.get("visibility") == "private"
            self._json({"url": f"{hub.endpoint}/{name}"}, status)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            self._json({"files": [_mode(file["path"]) for file in json.loads(body)["files"]]})
        elif path.endswith("/objects/batch"):
            self._json(
                {"transfer": "basic", "objects": [self._place(o) for o in json.loads(body)["objects"]]}
            )
        elif path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._json({"error": "no such address"}, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert "Authorization" not in self.headers, "the token went to the store of objects"
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self._headers(200, {"Content-Length": "0"})

    def _is_allowed(self) -> bool:
        is_allowed = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if not is_allowed:
            self._json({"error": "Invalid username or password."}, 401)
        return is_allowed

    def _info(self) -> None:
        hub = self.server
        if re.match("/api/models/([^/]+/[^/?]+)", self.path)[1] != hub.repo:
            self._json({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
            return
        siblings = [{"rfilename": name} for name in hub.files]
        info = {"id": hub.repo, "sha": "0" * 40, "private": hub.is_private, "siblings": siblings}
        self._json(info)

    def _place(self, asked: dict) -> dict:
        if asked["oid"] in self.server.objects:
            return asked
        href = f"http://localhost:{self.server.server_port}/lfs/{asked['oid']}"
        return {**asked, "actions": {"upload": {"href": href}}}

    def _commit(self, lines: list[dict]) -> None:
        hub = self.server
        if hub.refusal:
            told = hub.refusal.replace("TOKEN", self.headers["Authorization"])
            self._json({"error": told}, 403, **{"X-Error-Message": told})
            return
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.objects[value["oid"]]
        self._json({"commitUrl": f"{hub.endpoint}/{hub.repo}/commit/{'1' * 40}", "commitOid": "1" * 40})


def _mode(name: str) -> dict:
    mode = "lfs" if is_large(name) else "regular"
    return {"path": name, "uploadMode": mode, "shouldIgnore": False}


class ModelHub(HubServer):
    """`repo` is the one repository that exists, "" for none yet; `calls` lists what was posted where."""

    handler = ModelHandler

    def __init__(self, repo: str = "", files: dict[str, bytes] | None = None) -> None:
        super().__init__(files or {})
        self.repo = repo
        self.is_private = False
        self.token = "hf_testtokenofnobody"
        self.refusal = ""
        self.objects: dict[str, bytes] = {}
        self.calls: list[str] = []
