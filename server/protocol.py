"""HTTP/1.1 as this server speaks it: uvicorn's, with bounds on what a client may take in time and send in headers.

uvicorn waits for ever for the end of a request's head and for a client that does not read its answer, and its fast
parser takes headers of any size. Bodies are bounded in `server.api.middleware`, where their limits are known.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.errors import error_body

MAX_HEAD_BYTES = 1 << 16
"""Of a request line and headers; a head that is refused may have grown by one more read from the socket."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection.

    Attributes:
        patience: seconds that a client may take for the head of a request, and for reading what it is sent.
    """

    patience = 30.0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._in_head = False
        """Whether the beginning of a head is there, and not its end."""
        self._head_bytes = 0
        """Received of a head that came in several pieces."""
        self._header_bytes = 0
        """Of its headers, whole ones."""
        self._refusal: HTTPStatus | None = None
        self._head_due: asyncio.TimerHandle | None = None
        self._read_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_due = self.loop.call_later(self.patience, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting_for_head()
        self._stop_waiting_for_reader()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        began_in_head = self._in_head
        super().data_received(data)
        if not self._awaits_head:
            self._stop_waiting_for_head()
            return
        if self._head_due is None and not self.transport.is_closing():
            self._head_due = self.loop.call_later(self.patience, self._give_up)
        if began_in_head and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    @property
    def _awaits_head(self) -> bool:
        """Whether nothing is being answered, or the next request has begun already."""
        return self._in_head or self.cycle is None or self.cycle.response_complete

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes, self._header_bytes = True, 0, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MAX_HEAD_BYTES:
            self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise ValueError("the headers are too large")  # the parser stops, and uvicorn refuses the request

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._read_due is None:
            self._read_due = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_waiting_for_reader()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        del msg
        self._refuse(self._refusal or HTTPStatus.BAD_REQUEST)

    def _stop_waiting_for_head(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None
        self._head_bytes = 0

    def _stop_waiting_for_reader(self) -> None:
        if self._read_due is not None:
            self._read_due.cancel()
            self._read_due = None

    def _give_up(self) -> None:
        self._head_due = None
        if self._in_head:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        else:
            self.transport.close()

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer what is no request, unless another one is being answered, and close the connection."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            message, code = _REFUSALS[status]
            body = json.dumps(error_body(message, status, code=code)).encode()
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()


_REFUSALS = {
    HTTPStatus.BAD_REQUEST: ("this is not HTTP/1.1", "invalid_http"),
    HTTPStatus.REQUEST_TIMEOUT: ("the head of the request took too long", "request_timeout"),
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: (
        f"the headers exceed {MAX_HEAD_BYTES} bytes",
        "headers_too_large",
    ),
}
