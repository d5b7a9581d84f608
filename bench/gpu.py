"""What does the product do on a GPU, and how far is it from what the card permits?

`python -m bench.gpu` takes one command and less than nine minutes on a machine with PyTorch, Triton and transformers:
no network, no server, no index. A Llama of eight billion random weights and synthetic experts at four densities stand
for real ones; the demo's base with its real experts is added where its files are at hand. First every kernel is held
against plain PyTorch on fresh inputs, and a captured step against the same one kernel by kernel; then everything is
timed, next to its floor: the bytes it moves over the copy bandwidth measured in the same run, or what it computes over
the measured rate of a matrix product. Single kernels are timed by events, all else by the wall clock.

`--dry-run` goes through every line on the CPU with tiny shapes, with TRITON_INTERPRET=1 through the Triton kernels; its
figures prove nothing and are written only where `--out` says.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench import (
    gpu_attention,
    gpu_checks,
    gpu_kernels,
    gpu_loads,
    gpu_peers,
    gpu_quantised,
    gpu_real,
    gpu_search,
    gpu_steps,
)
from bench.gpu_bench import Bench
from bench.gpu_lab import DRY, FULL, Lab
from bench.report import RESULTS, Bar, Row, show, write
from server.engine.kernels import Kernels, available, backend

SECONDS = 480.0
"""Sections that would begin later are left out, and the result says so."""


@dataclass
class Run:
    """What has come out so far.

    Attributes:
        only: a pattern that titles of sections must have in them.
        keep: called after every section, so that a run that is cut off is not lost.
    """

    lab: Lab
    only: str = ""
    keep: Callable[[Run], object] = lambda _: None
    rows: list[Row] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def wants(self, title: str) -> bool:
        return re.search(self.only, title) is not None

    def section(self, title: str, measure: Callable[[], tuple[list[Row], list[Bar]]], *, always: bool = False) -> None:
        """Measure, print and keep; a section that fails is told, and does not take the others with it."""
        if not (always or self.wants(title)):
            return
        if self.lab.seconds_left < 0:
            self.failures.append(f"{title}: left out, there was no time")
            return
        began = time.monotonic()
        try:
            with torch.no_grad():
                rows, bars = measure()
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{title}: {type(error).__name__}: {error}")
            return
        finally:
            if self.lab.left_out:
                self.failures.append(f"{title}: no time for {'; '.join(self.lab.left_out)}")
                self.lab.left_out.clear()
            self.lab.free()
        self.rows += [{"section": title, **row} for row in rows]
        self.bars += bars
        show(rows, bars, title=f"{title} ({time.monotonic() - began:.0f} s)")
        sys.stdout.flush()
        self.keep(self)


def checks(lab: Lab, implementations: list[Kernels]) -> tuple[list[Row], list[Bar]]:
    """Every implementation that runs here against the reference."""
    rng = np.random.default_rng()
    found: list[Row] = []
    for kernels in implementations:
        found.append(gpu_checks.check_linear(kernels, lab, rng))
        found.append(gpu_checks.check_fused(kernels, lab, rng))
        found.append(gpu_checks.check_merge(kernels, lab, rng))
        found.append(gpu_checks.check_transcode(kernels, lab, rng))
        if kernels.name == "triton":
            found.append(gpu_checks.check_step(kernels, lab))
    return found, []


def measure(run: Run, kernels: Kernels, implementations: list[Kernels], real: tuple[Path, Path] | None) -> None:
    """All sections, those that the bars need first.

    Single kernels are timed in the last of the implementations: Triton's, where they run at all. On a GPU these are
    the only ones; in the interpreter steps with them would take hours.
    """
    lab = run.lab
    run.section("kernels against the reference", lambda: checks(lab, implementations))
    if run.failures:
        return  # the time of a wrong kernel is worth nothing
    bench: list[Bench] = []

    def load() -> tuple[list[Row], list[Bar]]:
        bench.append(Bench(lab, kernels))
        weights = sum(p.numel() for p in bench[0].model.parameters.values())
        return [{"what": "base", "weights, billions": weights / 1e9}], []

    on_base: dict[str, Callable[[Bench], tuple[list[Row], list[Bar]]]] = {
        "decode steps": gpu_steps.decode,
        "decode steps as CUDA graphs": gpu_steps.graphs,
        "a hundred experts beside the base": gpu_steps.registered,
        "switches": gpu_steps.switch,
        "experts that fit": gpu_steps.resident,
        "cold experts": gpu_loads.cold,
        "against transformers' continuous batching": gpu_peers.peers,
    }
    if any(run.wants(title) for title in on_base):
        run.section("a base of random weights", load, always=True)
    if bench:
        for title, section in on_base.items():
            run.section(title, partial(section, bench[0]))
        bench.clear()
    run.section("kernel by kernel: merged", lambda: (gpu_kernels.merge_rows(lab, implementations[-1]), []))
    run.section("kernel by kernel: mixed", lambda: (gpu_kernels.linear_rows(lab, implementations[-1]), []))
    run.section("kernel by kernel: prompts", lambda: (gpu_kernels.fused_rows(lab, implementations[-1]), []))
    run.section("kernel by kernel: loads", lambda: (gpu_kernels.transcode_rows(lab, implementations[-1]), []))
    run.section("the base in eight and four bits", lambda: (gpu_quantised.product_rows(lab), []))
    run.section("attention over the paged cache", lambda: (gpu_attention.attention_rows(lab), []))
    run.section("prompts among the centres of experts", lambda: (gpu_search.search_rows(lab), []))
    if real is not None:
        run.section("a real base with real experts", lambda: (gpu_real.real(lab, *real, kernels.name), []))
    else:
        print("SmolLM2's weights are not at hand; `--base FOLDER` names them")


def slug(device: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; proves that every line runs")
    parser.add_argument("--base", type=Path, default=gpu_real.base_at_hand(), help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--experts", type=Path, default=gpu_real.EXPERTS, help="folder of its experts")
    parser.add_argument("--only", default="", help="sections whose titles have this pattern in them (default all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which nothing new begins (default 480)")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default bench/results; of a dry run: nowhere)")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry-run goes through every line on the CPU")
    began = time.monotonic()
    device = torch.device("cpu") if arguments.dry_run else torch.empty(0, device="cuda").device
    lab = Lab(device, DRY if arguments.dry_run else FULL, arguments.seconds)
    names = [name for name, why in available(device).items() if why is None]
    implementations = [backend(name, device) for name in names if name != "reference"] or [backend("reference", device)]
    kernels = implementations[0]
    for implementation in implementations:
        implementation.prepare(lab.dtype, device)
    card = torch.cuda.get_device_name(device) if lab.on_gpu else "CPU, a dry run"
    print(f"{card}: copies {lab.copied / 1e9:.0f} GB/s, multiplies {lab.multiplied / 1e12:.2f} TFLOP/s in {lab.dtype}, "
          f"takes {lab.carried / 1e9:.0f} GB/s from the host")  # fmt: skip
    folder = arguments.out or (None if arguments.dry_run else RESULTS)

    def keep(run: Run) -> None:
        if folder is None:
            return
        card_row: Row = {"section": "card", "copied GB/s": lab.copied / 1e9, "kernels": kernels.name,
                         "multiplied TFLOP/s": lab.multiplied / 1e12, "carried GB/s": lab.carried / 1e9,
                         "failures": run.failures}  # fmt: skip
        command = f"python -m bench.gpu {' '.join(sys.argv[1:])}".strip()
        write("gpu", command, [card_row, *run.rows], run.bars, device=slug(card), folder=folder)

    run = Run(lab, arguments.only, keep)
    measure(run, kernels, implementations, (arguments.base, arguments.experts) if arguments.base else None)
    keep(run)
    for failure in run.failures:
        print(f"FAILED {failure}")
    print(f"{time.monotonic() - began:.0f} s; {len(run.bars)} bars, {sum(b['met'] for b in run.bars)} met")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
