"""Traces: spans of a request, sent to a real OTLP receiver; and nothing at all where none is configured."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from server.engine.timing import Timing
from server.tracing import NoTracing, tracing_to
from store.errors import InvalidRequestError
from tests.api.house import House, open_house

otel = pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
pytestmark = pytest.mark.anyio


class Collector:
    """Takes what an exporter sends, as an OpenTelemetry collector would."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.spans: list[Any] = []
        self.paths: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                sent = ExportTraceServiceRequest.FromString(body)
                collector.paths.add(self.path)
                for resource in sent.resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


async def test_a_request_is_a_trace_of_its_parts(collector: Collector, tmp_path: Path) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    async with open_house(tmp_path, otel_endpoint=collector.endpoint) as house:
        now = time.monotonic()
        house.engine.timing = Timing(now - 1.0, now - 0.8, now - 0.7, now - 0.1, patching=0.2)
        headers = {"traceparent": f"00-{trace}-{parent}-01"}
        body = {"model": "dummy-base", "messages": [{"role": "user", "content": "my-secret"}]}
        answer = await house.http.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200
        await house.http.get("/health")
    spans = [span for span in collector.spans if span.trace_id.hex() == trace]
    by_name = {span.name: span for span in spans}
    assert by_name.keys() == {"POST /v1/chat/completions", "route", "load", "queue", "patch", "prefill", "decode"}
    whole = by_name.pop("POST /v1/chat/completions")
    assert whole.parent_span_id.hex() == parent
    told = attributes(whole)
    assert (told["http.route"], told["http.response.status_code"]) == ("/v1/chat/completions", 200)
    assert told["request_id"] == answer.headers["x-request-id"]
    assert all(span.parent_span_id == whole.span_id for span in by_name.values())
    seconds = {name: (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 for name, span in by_name.items()}
    assert seconds["load"] == pytest.approx(0.2, abs=1e-3)
    assert seconds["queue"] == pytest.approx(0.1, abs=1e-3)
    assert seconds["patch"] == pytest.approx(0.2, abs=1e-3)
    assert seconds["prefill"] == pytest.approx(0.4, abs=1e-3)
    assert attributes(by_name["route"])["reason"] == "base_requested"
    assert attributes(by_name["decode"])["tokens"] > 0
    assert collector.paths == {"/v1/traces"}
    assert "my-secret" not in str(collector.spans)


async def test_a_collector_that_is_away_disturbs_nobody(tmp_path: Path) -> None:
    async with open_house(tmp_path, otel_endpoint="http://127.0.0.1:9") as house:
        assert (await ask(house)).status_code == 200


async def test_without_an_endpoint_nothing_is_traced(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        assert isinstance(house.app.state.services.tracing, NoTracing)
        assert (await ask(house)).status_code == 200


async def ask(house: House) -> Any:
    return await house.chat("hello")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InvalidRequestError, match=r"switchyard\[otel\]"):
        tracing_to("http://127.0.0.1:9")
