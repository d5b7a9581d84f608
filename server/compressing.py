"""`switchyard compress`: progress while it runs, a report when it is done."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from server.compress_report import remarks
from server.engine.base_source import resolve_base
from server.jobs.process import report_of
from server.settings import Settings
from store.convert import compress
from store.errors import InvalidRequestError
from store.exemplars import parse_exemplars
from store.labelled import parse_labelled
from store.report import Report
from store.widening import compress_widening

_STAGES = {
    "fingerprint": "fingerprint of the base",
    "learn": "learning from exemplars",
    "compress": "compressing tensors",
    "calibrate": "calibrating the scales",
    "measure": "comparing with the fine-tune",
    "write": "writing and checking the file",
}


def compress_with_progress(
    out: Console,
    base: str,
    tuned: Path,
    output: Path,
    *,
    cache_dir: Path | None,
    exemplars: Path | None,
    labelled: Path | None = None,
    widen: bool = False,
    **options: Any,
) -> Report:
    """Compress on a terminal; `options` go to `store.convert.compress`.

    Args:
        labelled: JSON lines of prompts with their answers.
        widen: where a floor is not met, try again with more room.

    Raises:
        SwitchyardError: as `compress`, or a file cannot be read.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    cache = cache_dir or Settings.model_fields["cache_dir"].get_default(call_default_factory=True)
    prompts = None if exemplars is None else parse_exemplars(_bytes_of(exemplars, "exemplars"))
    rows = None if labelled is None else parse_labelled(_bytes_of(labelled, "labelled"))
    with out.status("preparing the base"):
        folder = resolve_base(base, cache)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out) as bars:
        tasks = {stage: bars.add_task(text, total=None, visible=False) for stage, text in _STAGES.items()}

        def tell(stage: str, done: int, total: int) -> None:
            for earlier in list(_STAGES)[: list(_STAGES).index(stage)]:
                if bars.tasks[tasks[earlier]].visible:
                    bars.update(tasks[earlier], total=1, completed=1)
            bars.update(tasks[stage], completed=done, total=total, visible=True)

        run = compress_widening if widen else compress
        report = run(folder, tuned, output, exemplars=prompts, labelled=rows, cache_dir=cache, progress=tell, **options)
        for task in tasks.values():
            if bars.tasks[task].visible:
                bars.update(task, total=1, completed=1)
    _show(report, output, out)
    return report


def _bytes_of(file: Path, param: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"cannot read {file}: {error.strerror}", param=param) from None


def _show(report: Report, output: Path, out: Console) -> None:
    table = Table("stored", "tensors", "parameters", "nonzeros", "bytes")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in report.rows:
        table.add_row(row.kind, f"{row.tensors:,}", f"{row.parameters:,}", f"{row.nonzeros:,}", f"{row.bytes:,}")
    out.print(table)
    how = f"{report.codec}, {report.knob}" if report.knob else str(report.codec)
    if (found := report.calibration) is not None:
        how += (
            f"; KL to the fine-tune in nats/token: {found.kl_at_one:.3f} with rms, {found.kl_at_multiplier:.3f} with "
            f"{found.multiplier:.2f} × rms, {found.kl:.3f} with each tensor's own multiplier "
            f"({min(found.multipliers.values()):.2f} to {max(found.multipliers.values()):.2f})"
        )
    if (learned := report.learned) is not None:
        how += f"; KL to the fine-tune in nats/token: {learned.kl:.3f}"
        # Of few exemplars none is held out.
        how += "" if math.isnan(learned.held_out_kl) else f", {learned.held_out_kl:.3f} on exemplars held out"
    out.print(
        f"[bold]{escape(str(output))}[/]: {report.bytes / 1e6:.2f} MB, {report.bits_per_param:.3f} bits per parameter, "
        f"{report.times_smaller:.0f} × smaller than bf16, density {report.density:.4f}\n"
        f"{how}; {report.changed:.1%} of the parameters changed, relative error {report.relative_error:.3f}; "
        f"took {report.seconds:.0f} s"
    )
    for line in remarks(report_of(report)):
        out.print(line, highlight=False)
