"""The process of one job: `python -m server.jobs.process`. Limited, nice, and gone with the server.

The first line of its input is the task; the end of its input is the server's. It writes one JSON object a line: how far
it is, and at last a report or an error; nothing else gets there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import store

_TOLD_SECONDS = 0.1
_NICENESS = 10
_SERVED = (".json", ".model", ".jinja", ".txt")
"""Files of the base that a model is run with, besides its weights."""


_out = sys.stdout
"""Where the server listens."""


def main() -> None:
    set_apart()
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_the_server, daemon=True).start()
    os.nice(_NICENESS)
    for limit, value in ((resource.RLIMIT_DATA, task["memory"]), (resource.RLIMIT_FSIZE, task["file_bytes"])):
        resource.setrlimit(limit, (value, value))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (task["cpu_seconds"], task["cpu_seconds"] + 5))
    _say(work(task))


def set_apart() -> None:
    """Let what libraries print go elsewhere than to the server, which reads every line."""
    global _out
    _out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def environment(workplace: Path) -> dict[str, str]:
    """What the process needs, and no more: a server's environment holds keys, and the device is the server's."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    return kept | {
        "PYTHONPATH": str(Path(store.__file__).parents[1]),
        "HOME": str(workplace),
        "TMPDIR": str(workplace),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def work(task: dict[str, Any]) -> dict[str, Any]:
    """Compress what lies in the input folder; a report, or an error."""
    from store.card import card_from_json
    from store.convert import compress
    from store.errors import SwitchyardError
    from store.labelled import Labelled
    from store.strict_json import Fields
    from store.widening import compress_widening

    base, tuned, out = Path(task["base"]), Path(task["input"]), Path(task["out"])
    told = 0.0

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > _TOLD_SECONDS or done == 0:
            told = time.monotonic()
            _say({"stage": stage, "done": done, "total": total})

    try:
        if not (tuned / "adapter_config.json").is_file():
            _furnish(tuned, base)
        options = dict(task["options"])
        options["card"] = card_from_json(Fields(options.get("card", {}), "card"))
        options["labelled"] = [Labelled(**row) for row in options["labelled"]] if "labelled" in options else None
        options["relative_to"] = [Path(file) for file in task["relative_to"]]
        run = compress_widening if options.pop("widen", False) else compress
        report = run(base, tuned, out, cache_dir=Path(task["cache"]), progress=tell, **options)
    except SwitchyardError as error:
        return {"error": {"message": error.message, "param": error.param, "code": error.code}}
    except MemoryError:
        return _out_of_memory()
    except RuntimeError as error:  # torch's way to say so
        if "allocate memory" in str(error) or "not enough memory" in str(error):
            return _out_of_memory()
        raise
    return {"report": report_of(report)}


def report_of(report: Any) -> dict[str, Any]:
    """A report as JSON has it: the numbers, without what is known per tensor."""
    from store.measured import figures

    given = dataclasses.asdict(report)
    for apart in ("calibration", "learned", "measured"):
        del given[apart]
    return given | figures(report.measured)


def _furnish(tuned: Path, base: Path) -> None:
    """Give a checkpoint the base's configuration and tokenizer: it is served with them, and its own are not trusted."""
    for file in base.iterdir():
        if file.suffix in _SERVED and not file.name.endswith(".index.json"):
            shutil.copyfile(file, tuned / file.name)


def _out_of_memory() -> dict[str, Any]:
    return {"error": {"message": "it needs more memory than jobs may have (job_memory)", "param": None,
                      "code": "job_memory_exceeded"}}  # fmt: skip


def _leave_with_the_server() -> None:
    sys.stdin.read()
    os._exit(1)


def _say(what: dict[str, Any]) -> None:
    _out.write(json.dumps(what) + "\n")
    _out.flush()


if __name__ == "__main__":
    main()
