"""One client's checks in a process of its own: `python -m bench.clients.worker MODULE TARGET [FEATURE ...]`."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Sequence

from bench.clients import fence
from bench.clients.target import Target

Check = Callable[[Target], None]


def outcome(check: Check, target: Target) -> str | None:
    """What went wrong, in a line, or None. The whole story goes to standard error."""
    reached = len(fence.escapes)
    try:
        check(target)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return f"wanted to reach {fence.escapes[reached]}" if len(fence.escapes) > reached else None


def main(arguments: Sequence[str]) -> None:
    """Print one JSON line per feature."""
    module, target, *only = arguments
    fence.raise_fence()
    checks: Sequence[Check] = importlib.import_module(f"bench.clients.{module}").CHECKS
    for check in checks:
        if not only or check.__name__ in only:
            with contextlib.redirect_stdout(sys.stderr):
                found = outcome(check, Target.from_json(target))
            print(json.dumps({"feature": check.__name__, "error": found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
