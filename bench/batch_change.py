"""What the host does when a batch of captured decode steps changes: `python -m bench.batch_change`.

A base with the modules of an 8B one (224 matrices, 65 norms), whose tensors are tiny: time goes into addresses. A row
per expert; experts move every matrix, with or without the norms, all as planes or each as planes or lists by chance,
where hardly two matrices have their experts' forms in common. Timed is everything from the spans of a new batch to the
tensors that its graph reads, filled, in turns with the same tables made matrix by matrix and group by group; and what
Triton's kernels need where the last expert's row is a prompt of 200 and the step runs kernel by kernel. Nothing is
multiplied. Without a GPU, a copy to the device is one within the host's memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bench import report
from bench.gpu import slug
from bench.gpu_lab import Size
from bench.gpu_world import config_of, experts_of, parcel
from server.engine.attention import ATTENTION_NAME
from server.engine.expert import DecodedExpert
from server.engine.kernels.gpu import TritonKernels
from server.engine.kernels.reference import ReferenceKernels
from server.engine.kernels.types import DenseValues
from server.engine.layout import Span
from server.engine.mixed import MixedWeights, Terms
from server.engine.mixed_graphs import HeldTerms, MixedForms
from server.engine.model import BaseModel
from server.engine.sites import Kind, find_sites
from store.manifest import BaseManifest
from store.mix import Mix
from tests.engine.kernels import plain_tables

SIZE = Size(64, 96, 32, 4, 2, 160, 512)
"""An 8B base's layers."""
PLANES, LISTS = 0.1, 0.012
"""Densities of matrices in these forms."""
_KINDS = {"": (1.0, False), "with norms": (1.0, True), "with norms, forms by chance": (0.7, True)}
"""Share of planes, and whether norms are moved."""
_PROMPT = 200
_GOALS = {8: 2.0, 32: 4.0}
"""Experts → milliseconds."""


def tiny_base(device: torch.device) -> BaseModel:
    torch.manual_seed(0)
    with device:
        network = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config_of(SIZE), dtype=torch.bfloat16, attn_implementation=ATTENTION_NAME
        )
    manifest = BaseManifest("random", {name: tuple(p.shape) for name, p in network.named_parameters()})
    return BaseModel.of_network(network, manifest, feature_layer=1)


def experts(model: BaseModel, count: int, share: float, norms: bool, device: torch.device) -> dict[str, DecodedExpert]:
    """So many by digest, each in memory of its own; of about that share of the matrices they have planes."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    several = (experts_of(parcel(model, density), count, device) for density in (PLANES, LISTS))
    for planes, lists in zip(*several, strict=True):
        draws = torch.rand(len(planes.tensors), generator=generator).tolist()
        tensors = {
            name: delta if draw < share else lists.tensors[name]
            for draw, (name, delta) in zip(draws, planes.tensors.items(), strict=True)
        }
        if norms:
            vectors = {name: p for name, p in model.parameters.items() if p.ndim == 1}
            tensors |= {name: DenseValues(torch.randn(p.shape, device=device)) for name, p in vectors.items()}
        found[planes.digest] = DecodedExpert(planes.digest, tensors)
    return found


class Steps:
    """Batches of one form, one row per expert, and what it takes to go from one to another."""

    def __init__(self, model: BaseModel, found: Mapping[str, DecodedExpert], device: torch.device) -> None:
        kernels, sites = ReferenceKernels(), find_sites(model.network, model.parameters, model.try_out)
        self._weights = MixedWeights(*sites, model.parameters, kernels)
        self._uncaptured = MixedWeights(*sites, model.parameters, TritonKernels())
        self._forms = MixedForms(kernels, len(found))
        self._experts = found
        self._ids = torch.zeros(len(found), dtype=torch.int64, device=device)
        self._device = device
        mixes = [Mix.of({digest: 1.0}) for digest in found]
        self._batches = [
            tuple(Span(mix, row, row + 1) for row, mix in enumerate(mixes[first:] + mixes[:first])) for first in (0, 1)
        ]
        self._held: dict[Hashable, HeldTerms] = {}
        size = 0
        for _ in self._batches:
            terms = self._terms()
            form = self._forms.of(terms)
            assert form is not None
            self._held[form.key] = HeldTerms(terms, form, len(found), self._forms, device)
            size = form.tables.size
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._tables = torch.zeros(size, dtype=torch.int64, device=device)

    def at_once(self) -> None:
        """As servers do it."""
        terms = self._terms()
        form = self._forms.of(terms)
        assert form is not None
        self._held[form.key].fill(terms, form, self._ids)

    def with_a_prompt(self) -> None:
        """A step that is not captured; of experts without norms, which Triton would have to merge."""
        self._batches.reverse()
        *rows, last = self._batches[0]
        spans = (*rows, dataclasses.replace(last, stop=last.start + _PROMPT))
        self._uncaptured.forget()
        with self._uncaptured.carrying(spans, self._batches[0], self._experts):
            pass

    def one_by_one(self) -> None:
        """The tables alone, without norms."""
        terms = self._terms()
        made: list[torch.Tensor] = []
        for site in self._weights.sites:
            if site.kind is Kind.LINEAR and (groups := terms.groups(site)):
                rows, columns = groups[0].terms[0][1].shape
                own = plain_tables.launches(groups, len(self._ids), (rows, columns), padded=True)
                made += [launch.table for launch in own or ()]
        torch.cat(made, out=self._host)
        self._tables.copy_(self._host, non_blocking=True)

    def _terms(self) -> Terms:
        self._batches.reverse()
        self._weights.forget()
        return self._weights.terms(self._batches[0], self._batches[0], self._experts)


def milliseconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="changes timed of each kind, in turns")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, or cuda")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the result")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny_base(given.device)
    rows: list[report.Row] = []
    bars: list[report.Bar] = []
    for count, goal in _GOALS.items():
        for kind, (share, norms) in _KINDS.items():
            steps = Steps(model, experts(model, count, share, norms, given.device), given.device)
            works = {"at once": steps.at_once, "one by one": steps.one_by_one}
            if not norms:
                works["with a prompt"] = steps.with_a_prompt
            taken: dict[str, list[float]] = {name: [] for name in works}
            for turn in range(given.rounds + 2):
                for name, work in works.items():
                    spent = milliseconds(work, given.device)
                    if turn > 1:  # vectors of mixes are merged when a mix first comes
                        taken[name].append(spent)
            ms, before, *prompt = (statistics.median(times) for times in taken.values())
            what = f"{count} experts {kind}".strip()
            rows.append({"what": what, "ms": ms, "least ms": min(taken["at once"]), "ms one by one": before,
                         "×": before / ms, "ms with a prompt": prompt[0] if prompt else None})  # fmt: skip
            if share == 1.0:
                said = f"host work of a batch change at 224 matrices, {what}, ms"
                bars.append(report.bar(f"batch_change.{count}{'.norms' if norms else ''}", said, ms, "<=", goal))
    report.show(rows, bars, title="a batch change")
    device = slug(torch.cuda.get_device_name()) if given.device.type == "cuda" else None
    command = f"python -m bench.batch_change {shlex.join(sys.argv[1:])}".strip()
    report.write("batch_change", command, rows, bars, device=device, folder=given.out)


if __name__ == "__main__":
    main()
