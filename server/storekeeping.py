"""`switchyard store`: check a store, repair it, clear it, copy it into another one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from store.backends import BlobStore
from store.backends.opening import open_ledger, open_store
from store.errors import SwitchyardError
from store.garbage import collect, used_in
from store.keys import KIND as KEYS
from store.tenants import KIND as TENANTS
from store.upkeep import Verdict, migrate, verify


def verify_store(address: str, out: Console, *, repair: bool, cache: Path | None) -> None:
    """Print what is wrong with a store.

    Args:
        cache: the disk cache of a server that uses this Redis: where damaged bytes are healed from.

    Raises:
        SwitchyardError: something is wrong that has not been repaired, or the store failed.
    """
    faults = experts = idle = 0
    with _opened(address, cache) as store, Progress(console=out, transient=True) as progress:
        task = progress.add_task("reading", total=len(store.records()))
        for finding in verify(store, repair=repair):
            progress.advance(task)
            if finding.verdict is Verdict.IDLE:
                idle += 1
                continue
            experts += 1
            faults += finding.verdict.is_fault
            if finding.verdict is not Verdict.SOUND:
                out.print(f"{escape(finding.subject)}: [bold]{finding.verdict.value}[/]")
    if idle:
        out.print(f"{idle} files belong to no expert: `switchyard store gc` removes them when their time has come")
    if faults:
        raise SwitchyardError(f"{experts} experts checked, {faults} faults" + ("" if repair else "; try --repair"))
    out.print(f"{experts} experts checked: all is well")


def collect_store(address: str, out: Console, *, grace: float, dry_run: bool) -> None:
    """Remove what no expert has needed for `grace` seconds, and say what that was and what waits.

    Raises:
        SwitchyardError: a record is damaged, so that nothing may go; or the store failed.
    """
    with _opened(address, None) as store:
        if used_in(store) is None:
            raise SwitchyardError(
                "a record is damaged and may need any of the files: `switchyard store verify` says which"
            )
        found = collect(store, lambda: used_in(store), grace, dry_run=dry_run)
    for idle in found:
        state = ("would go" if dry_run else "is gone") if idle.is_due else f"waits {grace - idle.seconds:.0f} s more"
        out.print(f"{idle.digest}  {idle.bytes / 1e6:8.2f} MB  {state}")
    due = [idle for idle in found if idle.is_due]
    out.print(
        f"{len(due)} of {len(found)} files that no expert needs {'would go' if dry_run else 'are gone'}: "
        f"{sum(idle.bytes for idle in due) / 1e6:.2f} MB"
    )


def migrate_store(source: str, target: str, out: Console) -> None:
    """Copy all experts of one store into another, with progress, then API keys and tenants' limits.

    Raises:
        SwitchyardError: as `store.upkeep.migrate`; what was copied before stays.
    """
    copied = there = 0
    with (
        _opened(source, None) as origin,
        _opened(target, None) as goal,
        Progress(console=out, transient=True) as progress,
    ):
        task = progress.add_task("copying", total=len(origin.records()))
        for _, is_new in migrate(origin, goal):
            progress.advance(task)
            copied, there = copied + is_new, there + (not is_new)
    out.print(f"{copied} experts copied, {there} were there already")
    keys = _copy_ledger(source, target)
    if keys:
        out.print(f"{keys} API keys and limits of tenants copied; what was used so far is not")


def _copy_ledger(source: str, target: str) -> int:
    """Keys work on under their own names; what the target has already stays."""
    with ExitStack() as opened:
        origin = opened.enter_context(closing(open_ledger(source)))
        documents = [(kind, name, data) for kind in (KEYS, TENANTS) for name, data in origin.documents(kind).items()]
        if not documents:
            return 0
        goal = opened.enter_context(closing(open_ledger(target)))
        return sum(goal.put(kind, name, data, absent=True) for kind, name, data in documents)


@contextmanager
def _opened(address: str, cache: Path | None) -> Iterator[BlobStore]:
    """An open store; without a cache to use, a Redis gets one that is gone afterwards."""
    folder = Path(address)
    if "://" not in address and folder.is_dir() and any(folder.iterdir()) and not (folder / "records").is_dir():
        raise SwitchyardError(f"{address} is not a store: it has no folder `records`")
    with tempfile.TemporaryDirectory(prefix="switchyard-") as scratch:
        store = open_store(address, cache=cache or Path(scratch), cache_bytes=1 << 62 if cache else 1 << 30)
        try:
            yield store
        finally:
            store.close()
