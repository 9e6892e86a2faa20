"""The hub with one model repository that accepts pushes, by the protocol of huggingface_hub 2.

    GET  /api/whoami-v2, /api/models/{repo}[/revision/{revision}], /api/models/{repo}/tree/main/{folder}
    POST /api/repos/create, /api/validate-yaml
    POST /api/models/{repo}/preupload/main             the files to upload as LFS objects: .pt, .pkl, .png
    POST /{repo}.git/info/lfs/objects/batch            upload addresses of the objects that are missing
    PUT  /lfs/{sha256}                                 an object, without a token
    POST /api/models/{repo}/commit/main                small files, and objects by name; makes them `files`

Every write needs `token`. `refusal`, if set, is the message that a commit is refused with.
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
        elif re.match("/api/models/[^/]+/[^/]+/tree/", self.path):
            self._json([])  # the list of a folder: all files are at the top
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
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            status = 409 if hub.repo == name else 200
            if status == 200:
                hub.repo, hub.is_private = name, request.get("visibility") == "private"
            self._json({"url": f"{hub.endpoint}/{name}"}, status)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            self._json({"files": [_mode(file["path"]) for file in json.loads(body)["files"]]})
        elif path.endswith("/objects/batch"):
            self._json(
                {
                    "transfer": "basic",
                    "objects": [self._with_address(item) for item in json.loads(body)["objects"]],
                }
            )
        elif path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._json({"error": "no such address"}, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert "Authorization" not in self.headers, "the token was sent to the object store"
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

    def _with_address(self, item: dict) -> dict:
        if item["oid"] in self.server.objects:
            return item
        href = f"http://localhost:{self.server.server_port}/lfs/{item['oid']}"
        return {**item, "actions": {"upload": {"href": href}}}

    def _commit(self, lines: list[dict]) -> None:
        hub = self.server
        if hub.refusal:
            message = hub.refusal.replace("TOKEN", self.headers["Authorization"])
            self._json({"error": message}, 403, **{"X-Error-Message": message})
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
    """`repo` is the one repository that exists, "" for none yet; `calls` lists the addresses of all POSTs."""

    handler = ModelHandler

    def __init__(self, repo: str = "", files: dict[str, bytes] | None = None) -> None:
        super().__init__(files or {})
        self.repo = repo
        self.is_private = False
        self.token = "hf_testtokenofnobody"
        self.refusal = ""
        self.objects: dict[str, bytes] = {}
        self.calls: list[str] = []
