"""No client may reach outside: in a fenced process every connection but to this machine is refused, and noted.

`python -m bench.clients.fence MODULE ...` runs a module's command line behind it.
"""

from __future__ import annotations

import ipaddress
import os
import runpy
import sys
from typing import Any

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
}
"""What clients are told so that they do not try."""

escapes: list[str] = []
"""Where a client wanted to go."""


class OutsideError(OSError):
    """A client wanted to leave this machine."""


def _is_here(host: object) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    host: object = None
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    if not _is_here(host):
        escapes.append(str(host))
        raise OutsideError(f"a client wanted to reach {host}")


def raise_fence() -> None:
    """From now on, in this process."""
    sys.addaudithook(_watch)


def environment(**more: str) -> dict[str, str]:
    """Of a client's process: quiet, and without settings of this shell that lead elsewhere."""
    dropped = ("SWITCHYARD_", "OPENAI_", "LANGCHAIN_", "LANGSMITH_", "LITELLM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | QUIET | more


def main() -> None:
    """Run a module behind the fence; status 3 if it wanted out, even if it came to terms with it."""
    module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    raise_fence()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        if escapes:
            print(f"{module} wanted to reach {', '.join(escapes)}", file=sys.stderr)
            os._exit(3)


if __name__ == "__main__":
    main()
