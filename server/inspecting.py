"""`switchyard inspect`: what is in an expert file."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from store.card import Card
from store.expert_file import SparseEntry, digest_of, read_header
from store.expert_header import ExpertHeader, LevelsEntry, LowRankEntry, TensorEntry
from store.layers import spent_by_layer
from store.measured import Measured
from store.signature import fingerprint, parse_signature, read_beside
from store.trust import trusted_keys

_SHOWN_EXEMPLARS = 5


def show_expert(file: Path, out: Console, keys: str = "") -> None:
    """Print a file's header, whose signature stands beside it, and a summary of its tensors by module.

    Args:
        keys: whose signatures count, separated by commas; see `store.trust`.

    Raises:
        ExpertFileError: the file breaks a rule of the format.
    """
    header = read_header(file)
    facts = Table.grid(padding=(0, 2))
    for label, value in [*_facts(file, header), ("signed by", _signed_by(file, keys))]:
        facts.add_row(f"[bold]{label}[/]", escape(value))
    out.print(facts)
    out.print(_modules(header))
    out.print(_layers(file))
    for exemplar in header.exemplars[:_SHOWN_EXEMPLARS]:
        out.print(f"  [dim]e.g.[/] {escape(exemplar[:160])}", highlight=False)
    if len(header.exemplars) > _SHOWN_EXEMPLARS:
        out.print(f"  [dim]and {len(header.exemplars) - _SHOWN_EXEMPLARS} more exemplars[/]")


def _facts(file: Path, header: ExpertHeader) -> list[tuple[str, str]]:
    params = ", ".join(f"{key}={value}" for key, value in header.codec_params.items() if key != "widened")
    tried = header.codec_params.get("widened")
    facts = [
        ("name", header.name or "(none)"),
        ("description", header.description or "(none)"),
        *_card(header.card),
        ("digest", digest_of(file)),
        ("base", header.base_fingerprint),
        ("size", f"{file.stat().st_size:,} bytes, {header.bits_per_param:.4f} bits per parameter of the base"),
        ("stands on", header.relative_to or "(the base)"),
        ("codec", f"{header.codec} ({params})" if params else header.codec),
        *([] if tried is None else [("widened", f"{tried}: each ended below a floor")]),
        ("density", f"{header.density:.4f}"),
        *([] if header.measured is None else measured_facts(header.measured)),
        ("exemplars", str(len(header.exemplars))),
        ("made by", header.tool),
    ]
    if header.created is not None:
        facts.append(("created", datetime.fromtimestamp(header.created, UTC).isoformat()))
    return facts


def measured_facts(measured: Measured) -> list[tuple[str, str]]:
    """What a report says of how close an expert comes to its fine-tune, line by line; the relative error first."""
    facts = [("relative error", f"{measured.relative_error:.4f}")]
    if measured.kl is not None and measured.agreement is not None:
        where = "held out" if measured.held_out else "that it was made from"
        facts.append(("KL to the fine-tune", f"{measured.kl:.4f} nats/token on {measured.prompts} exemplars {where}"))
        facts.append(("same answers", f"{measured.agreement:.1%} of the fine-tune's greedy ones"))
    if measured.score is not None:
        scores = (
            f"exact match {measured.score:.3f}, fine-tune {measured.fine_tune_score:.3f}, base "
            f"{measured.base_score:.3f}, on {measured.labelled} labelled exemplars"
        )
        kept = measured.retention
        facts.append(("retention", f"{kept:.1%} ({scores})" if kept is not None else f"no gain to keep ({scores})"))
    return facts


def _signed_by(file: Path, keys: str) -> str:
    text = read_beside(file)
    if text is None:
        return "(nobody)"
    signature, trusted = parse_signature(text), trusted_keys(key.strip() for key in keys.split(",") if key.strip())
    short = fingerprint(signature.key)
    if not signature.fits(digest_of(file)):
        return f"{short}: NOT VALID for this file"
    return f"{trusted[signature.key]} ({short})" if signature.key in trusted else f"{short}, no trusted key"


def _card(card: Card) -> list[tuple[str, str]]:
    facts = [
        ("author", card.author),
        ("licence", card.license),
        ("tags", ", ".join(card.tags)),
        ("made from", "\n".join(card.parents)),
        *card.metadata.items(),
    ]
    return [(escape(label), value) for label, value in facts if value]


def _modules(header: ExpertHeader) -> Table:
    """One row per kind of module and storage: layers look alike, so their tensors are added up."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, entry in header.tensors.items():
        module = ".".join(part for part in name.split(".") if not part.isdigit())
        group = groups[module, _stored_as(entry)]
        group[0] += 1
        group[1] += entry.numel
        group[2] += entry.nnz if isinstance(entry, SparseEntry) else entry.numel
    table = Table("tensors", "stored as", "count", "parameters", "density")
    for column in table.columns[2:]:
        column.justify = "right"
    for (module, stored), (count, numel, nonzeros) in groups.items():
        table.add_row(escape(module), stored, str(count), f"{numel:,}", f"{nonzeros / max(numel, 1):.4f}")
    return table


def _layers(file: Path) -> Table:
    """One row per layer."""
    table = Table("layer", "parameters", "density", "bits/param", "bit-width", "bytes")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, spent in spent_by_layer(file).items():
        table.add_row(
            name, f"{spent.parameters:,}", f"{spent.density:.4f}", f"{spent.bits_per_param:.4f}",
            f"{spent.bit_width:.2f}", f"{spent.bytes:,}",
        )  # fmt: skip
    return table


def _stored_as(entry: TensorEntry) -> str:
    if isinstance(entry, SparseEntry):
        return f"{entry.encoding}, levels" if isinstance(entry, LevelsEntry) else entry.encoding
    return f"rank {entry.rank}" if isinstance(entry, LowRankEntry) else "bf16"
