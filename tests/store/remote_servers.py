"""Buckets and repositories for the tests, over real HTTP on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
from moto.server import ThreadedMotoServer


class Bucket:
    """A bucket of a local server that speaks S3; `environment` is what its clients need."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="id",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        self._client.create_bucket(Bucket="bucket")

    def put(self, key: str, data: bytes) -> None:
        """Put a file there, or another one in its place."""
        self._client.put_object(Bucket="bucket", Key=key, Body=data)

    def delete(self, key: str) -> None:
        """Take a file away."""
        self._client.delete_object(Bucket="bucket", Key=key)

    def close(self) -> None:
        """Stop the server."""
        self._server.stop()


class Repository:
    """A repository `org/repo` behind a local server that stands for the hub: what `HF_ENDPOINT` may point to."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.tagged: dict[str, bytes] = {}
        """What its revision `v1` holds."""
        main, tagged = self.files, self.tagged

        class Hub(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                files, where = (tagged, "v1") if "/v1" in path else (main, "main")
                if path.startswith(f"/api/models/org/repo/tree/{where}"):
                    self._answer(200, json.dumps([_entry(name, data) for name, data in files.items()]).encode())
                elif path in ("/api/models/org/repo", f"/api/models/org/repo/revision/{where}"):
                    self._answer(200, json.dumps({"id": "org/repo", "sha": "c" * 40, "siblings": []}).encode())
                elif (name := path.removeprefix(f"/org/repo/resolve/{where}/")) in files:
                    self._send_part(files[name])
                else:
                    self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

            do_HEAD = do_GET

            def _send_part(self, data: bytes) -> None:
                first, last = 0, len(data) - 1
                if wanted := self.headers.get("range"):
                    start, _, end = wanted.removeprefix("bytes=").partition("-")
                    first, last = int(start), min(int(end), last)
                self._answer(206 if wanted else 200, data[first : last + 1])

            def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
