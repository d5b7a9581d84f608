"""What compressing cost and kept, line by line: of a report as JSON has it, made here or by a job of a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape

from server.inspecting import measured_facts
from store.codecs.base import CodecName
from store.measured import measured_from_json
from store.probe import Probe
from store.strict_json import Fields


def remarks(report: Mapping[str, Any]) -> Iterator[str]:
    """How close the expert comes to its fine-tune, what was tried before, and which codec would suit the delta; in
    rich's markup. The relative error, which stands with the sizes, is left out.

    Args:
        report: as `server.jobs.process.report_of` makes it.
    """
    for label, value in measured_facts(measured_from_json(Fields(report, "report")))[1:]:
        yield f"{label}: {value}"
    if report.get("unmeasured"):
        yield f"not compared with the fine-tune: {escape(report['unmeasured'])}"
    for tried in report.get("widened") or ():
        yield f"widened: {escape(tried)}"
    if report.get("probe"):
        yield from _suited(Probe(**report["probe"]), report["codec"])


def _suited(bits: Probe, codec: str) -> Iterator[str]:
    if codec == CodecName.OVERWRITE:
        yield (
            f"{bits.changed:.1%} of the weights changed; alone and at weight 1 this expert is the fine-tune bit by bit"
            + ("" if bits.is_worth_it else "; another codec would be far smaller")
        )
    elif bits.is_worth_it:
        yield (
            f"only {bits.changed:.1%} of the weights changed at all: [bold]--codec overwrite[/] keeps every bit of "
            f"the fine-tune in about {bits.bytes / 1e6:.2f} MB ({bits.smaller:.0f} × smaller than bf16)"
        )
