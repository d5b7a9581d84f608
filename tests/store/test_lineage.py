"""Experts on top of experts: in files, in a store, and for whom."""

from __future__ import annotations

from pathlib import Path

import pytest

from store.access import Access, AccessChange, Caller, Role, Visibility
from store.backends.disk import DiskStore
from store.convert import compress
from store.errors import ConflictError, ExpertUnavailableError, InvalidRequestError, NotFoundError
from store.expert_file import ExpertInfo, digest_of, read_deltas, validate, write_expert
from store.fingerprint import manifest_of
from store.lineage import MAX_DEPTH
from store.merge_methods import MergeSettings
from store.merging import merge_experts
from store.overwriting import as_float_delta
from store.record import KEPT_VERSIONS
from store.registry import Registry
from store.task_vector import task_vector
from store.trust import NO_TRUST, Trust, trusted_keys
from tests.store.builders import base_manifest, packed_expert, write_sample
from tests.store.keys import ADA
from tests.tiny import save_base, save_tuned

ACME = Caller("a", "acme", frozenset({Role.UPLOAD}))
GLOBEX = Caller("g", "globex", frozenset({Role.UPLOAD}))
STRICT = Trust(trusted_keys([ADA.line]), required=True)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(DiskStore(tmp_path / "store"), base_manifest(), frozenset({"auto"}))


def publish(registry: Registry, name: str, *, on: str | None = None, seed: int = 0, **options: object) -> str:
    path = registry._store.quarantine() / name  # type: ignore[attr-defined]
    write_sample(path, seed=seed, name=name, relative_to=on)
    record, _ = registry.publish(path, **options)  # type: ignore[arg-type]
    return record.digest


def test_what_stands_on_what(registry: Registry) -> None:
    knowledge = publish(registry, "knowledge")
    skill = publish(registry, "skill", on=knowledge)
    style = publish(registry, "style", on=skill)
    assert registry.get("style").relative_to == skill
    assert registry.lineage.below(style) == (skill, knowledge)
    assert registry.lineage.below(knowledge) == ()


def test_what_is_missing_is_not_published_upon(registry: Registry) -> None:
    with pytest.raises(InvalidRequestError, match="publish that first") as caught:
        publish(registry, "skill", on="a" * 64)
    assert (caught.value.param, caught.value.code) == ("relative_to", "parent_not_found")
    assert registry.list() == []


def test_depth_is_bounded(registry: Registry) -> None:
    below = publish(registry, "e0")
    for depth in range(1, MAX_DEPTH + 1):
        below = publish(registry, f"e{depth}", on=below)
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_DEPTH} others"):
        publish(registry, "too-deep", on=below)


def test_what_others_stand_on_stays(registry: Registry) -> None:
    knowledge = publish(registry, "knowledge")
    publish(registry, "skill", on=knowledge)
    with pytest.raises(ConflictError, match="skill stand on the expert knowledge") as caught:
        registry.remove("knowledge", force=True)
    assert caught.value.code == "has_children"
    registry.remove("skill")
    registry.remove("knowledge")


def test_the_same_file_under_another_name_will_do(registry: Registry) -> None:
    knowledge = publish(registry, "knowledge")
    path = registry._store.quarantine() / "again"  # type: ignore[attr-defined]
    write_sample(path, name="knowledge", relative_to=None)
    registry.publish(path, name="again")
    publish(registry, "skill", on=knowledge)
    registry.remove("knowledge")
    assert registry.lineage.below(registry.get("skill").digest) == (knowledge,)
    with pytest.raises(ConflictError):
        registry.remove("again")


def test_a_replaced_version_stays_while_something_stands_on_it(registry: Registry) -> None:
    first = publish(registry, "knowledge")
    publish(registry, "skill", on=first)
    for seed in range(1, KEPT_VERSIONS + 4):
        publish(registry, "knowledge", seed=seed, replace=True)
    record = registry.get("knowledge")
    assert len(record.earlier) == KEPT_VERSIONS
    assert record.earlier[-1].digest == first
    assert registry.lineage.below(registry.get("skill").digest) == (first,)
    assert registry.expert_bytes(first)


def test_an_expert_may_stand_on_its_own_earlier_version(registry: Registry) -> None:
    first = publish(registry, "e")
    second = publish(registry, "e", on=first, replace=True)
    assert registry.lineage.below(second) == (first,)
    registry.remove("e")


def test_what_was_lost_is_named_and_not_served(registry: Registry, tmp_path: Path) -> None:
    knowledge = publish(registry, "knowledge")
    publish(registry, "skill", on=knowledge)
    registry._store.delete_record("knowledge")  # as a copy of a part of a store would be
    with pytest.raises(ExpertUnavailableError, match=knowledge[:12]):
        registry.get("skill")
    assert registry.list() == []


def test_whoever_may_not_see_the_one_below_does_not_see_the_one_above(registry: Registry) -> None:
    knowledge = publish(registry, "knowledge", by=ACME)
    publish(registry, "skill", on=knowledge, by=ACME)
    assert registry.get("skill", ACME).access == Access("acme", Visibility.PRIVATE)
    with pytest.raises(InvalidRequestError, match="publish that first"):  # for others it does not exist
        publish(registry, "theft", on=knowledge, by=GLOBEX)
    registry.set_access("skill", AccessChange(Visibility.SHARED, ("globex",)))
    with pytest.raises(NotFoundError):
        registry.get("skill", GLOBEX)
    assert registry.names(GLOBEX) == frozenset()
    registry.set_access("knowledge", AccessChange(Visibility.SHARED, ("globex",)))
    assert registry.get("skill", GLOBEX).name == "skill"
    publish(registry, "other", on=knowledge, by=GLOBEX)
    with pytest.raises(ConflictError) as caught:  # who else stands on it is told without names
        registry.remove("knowledge", ACME)
    assert caught.value.message.startswith("skill and others stand on")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    base = save_base(folder / "base")
    first = save_tuned(base, folder / "first", seed=1)
    return base, first, save_tuned(first, folder / "second", seed=2, scale=0.02)


def test_compressing_against_an_expert(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """base + first + second is the second fine-tune, though the first was compressed with losses."""
    base, first, second = folders
    manifest = manifest_of(base, None)
    compress(base, first, tmp_path / "first", density=0.3)
    compress(base, second, tmp_path / "second", codec="raw", relative_to=[tmp_path / "first"])
    header = validate(tmp_path / "second", manifest)
    assert header.relative_to == digest_of(tmp_path / "first")
    assert header.card.parents == (header.relative_to,)
    assert "relative" in header.required_features
    compress(base, second, tmp_path / "third", codec="raw", relative_to=[tmp_path / "second", tmp_path / "first"])
    layers = [dict(read_deltas(tmp_path / name, manifest)) for name in ("first", "second")]
    for name, wanted in task_vector(base, second):
        found = sum(as_float_delta(deltas[name], None, name) for deltas in layers if name in deltas)
        assert abs(found - wanted.numpy().reshape(-1)).max() < 2e-3


def test_chains_that_are_not_whole(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, first, second = folders
    compress(base, first, tmp_path / "first", density=0.3)
    compress(base, first, tmp_path / "other", density=0.2)
    compress(base, second, tmp_path / "second", relative_to=[tmp_path / "first"])
    for given, said in (
        ([tmp_path / "second"], "give that file too"),
        ([tmp_path / "first", tmp_path / "other"], "does not stand on other"),
    ):
        with pytest.raises(InvalidRequestError, match=said) as caught:
            compress(base, second, tmp_path / "x", relative_to=given)
        assert caught.value.param == "relative_to"
    with pytest.raises(InvalidRequestError, match="cannot stand on another"):
        compress(base, second, tmp_path / "x", codec="overwrite", relative_to=[tmp_path / "first"])
    pair = [(tmp_path / "second", 1.0), (tmp_path / "first", 1.0)]
    with pytest.raises(InvalidRequestError, match="stands on the expert"):
        merge_experts(pair, manifest_of(base, None), tmp_path / "x", MergeSettings())


def test_what_is_not_served_here_needs_what_it_stands_on_all_the_same(tmp_path: Path) -> None:
    """A server of another base, or one that trusts fewer keys, removes nothing that others stand on."""
    store = DiskStore(tmp_path / "store")
    registry, strict = (Registry(store, base_manifest(), frozenset(), trust) for trust in (NO_TRUST, STRICT))
    elsewhere = Registry(store, base_manifest(1), frozenset())
    first = publish(registry, "knowledge")
    publish(registry, "skill", on=first)
    for server in (elsewhere, strict):
        assert server.list() == []
        with pytest.raises(ConflictError, match="skill stand on the expert knowledge") as caught:
            server.remove("knowledge", force=True)
        assert caught.value.code == "has_children"
    for seed in range(1, KEPT_VERSIONS + 4):
        path = store.quarantine() / "other"
        write_expert(path, ExpertInfo(codec="t-switch", tool="tests"), packed_expert(seed), base_manifest(1))
        elsewhere.publish(path, name="knowledge", replace=True)
    assert registry.get("skill").relative_to == first
    assert registry.lineage.below(registry.get("skill").digest) == (first,)
    store.close()


def test_a_copy_that_is_not_trusted_does_not_stand_in(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    lax, strict = (Registry(store, base_manifest(), frozenset(), trust) for trust in (NO_TRUST, STRICT))
    path = write_sample(store.quarantine() / "knowledge")
    first, _ = strict.publish(path, name="knowledge", signature=ADA.sign(digest_of(path)))
    lax.publish(write_sample(store.quarantine() / "copy"), name="copy")
    path = write_sample(store.quarantine() / "skill", relative_to=first.digest)
    strict.publish(path, name="skill", signature=ADA.sign(digest_of(path)))
    with pytest.raises(ConflictError):
        strict.remove("knowledge")
    strict.remove("copy")
    store.close()
