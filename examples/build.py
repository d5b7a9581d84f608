"""Write the data of the example tasks: `python -m examples.build [--task NAME]`.

Each task becomes `.cache/examples/data/NAME/{train,test,exemplars}.jsonl`, one JSON object per line:
`{"prompt", "answer"}` in the first two, `{"prompt"}` in the exemplars that go to the router.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from examples.fetch import CACHE, FetchError
from examples.tasks import TASKS, Row, Task

DATA = CACHE / "data"
PARTS = ("train", "test", "exemplars")


def build_task(task: Task, data: Path = DATA) -> Path:
    """Build one task and write its three files; returns the task's folder."""
    folder = data / task.name
    folder.mkdir(parents=True, exist_ok=True)
    split = task.split()
    _write(folder / "train.jsonl", split.train)
    _write(folder / "test.jsonl", split.test)
    _write(folder / "exemplars.jsonl", ({"prompt": prompt} for prompt in split.exemplars))
    return folder


def load_rows(task: Task, part: str, data: Path = DATA) -> list[Row]:
    """The rows of `part` ("train" or "test"), building the task's files first if they are not there."""
    folder = data / task.name
    if not all((folder / f"{name}.jsonl").is_file() for name in PARTS):
        build_task(task, data)
    with (folder / f"{part}.jsonl").open(encoding="utf-8") as lines:
        items = [json.loads(line) for line in lines]
    return [Row(prompt=item["prompt"], answer=item["answer"]) for item in items]


def _write(path: Path, items: Iterable[Mapping[str, object]]) -> None:
    scratch = path.with_suffix(".tmp")
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.build", description=__doc__)
    parser.add_argument("--task", choices=sorted(TASKS), help="only this task (default: all)")
    chosen = parser.parse_args().task
    for task in TASKS.values():
        if chosen in (None, task.name):
            try:
                folder = build_task(task)
            except FetchError as problem:
                raise SystemExit(f"{task.name}: {problem}") from None
            train, test = load_rows(task, "train"), load_rows(task, "test")
            print(f"{task.name}: {len(train)} train, {len(test)} test in {folder}")


if __name__ == "__main__":
    main()
