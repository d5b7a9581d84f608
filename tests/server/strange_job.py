"""A job's process that does what its `description` says, in place of `server.jobs.process`; its input is its result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from server.jobs import process

REPORT = {
    "bytes": 1,
    "bits_per_param": 0.1,
    "relative_error": 0.5,
    "kl": 0.25,
    "agreement": 0.75,
    "prompts": 16,
    "held_out": True,
    "score": 0.7,
    "base_score": 0.2,
    "fine_tune_score": 0.9,
    "labelled": 100,
    "unmeasured": None,
    "widened": ["density=0.02: it would be far away"],
    "probe": {"changed": 0.02, "bytes": 5_000_000, "smaller": 48.0},
}


def main() -> None:
    process.set_apart()
    task = json.loads(sys.stdin.readline())
    word = task["options"]["description"]
    process._say({"stage": "compress", "done": 1, "total": 2})
    if word == "sleep":
        time.sleep(60)
    elif word == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "silent":
        sys.exit(3)
    elif word == "chatty":
        sys.stdout.write("a library's greeting, without an end of line")
        sys.stdout.flush()
        os.system("echo and one of a program's")
    elif word == "memory":
        process._say(process._out_of_memory())
        return
    assert not {"SWITCHYARD_API_KEYS", "SECRET"} & os.environ.keys()
    [given] = Path(task["input"]).iterdir()
    shutil.copy(given, task["out"])
    more = {"much": "x" * (1 << 17)} if word == "chatty" else {}
    process._say({"report": REPORT | {"codec": task["options"]["codec"], "asked": task["options"]} | more})


if __name__ == "__main__":
    main()
