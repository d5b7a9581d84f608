"""Signatures: what they are, whose count, and that nobody gets past them by writing to the store."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.access import AccessChange, Caller, Role, Visibility
from store.backends import ANYTHING, BlobStore
from store.errors import InvalidRequestError, NotPermittedError, SignatureError, UntrustedError
from store.expert_file import digest_of
from store.registry import Registry
from store.signature import Signature, decode_signature, fingerprint, parse_signature, read_beside
from store.trust import Signer, Trust, trusted_keys
from tests.store.builders import base_manifest, write_sample
from tests.store.conftest import Opener
from tests.store.keys import ADA, MALLORY

DIGEST = "ab" * 32
TRUST = Trust(trusted_keys([ADA.line]), required=True)
ADA_SIGNER = Signer("ada@example.org", fingerprint(ADA.raw))


@pytest.fixture
def registry(store: BlobStore) -> Registry:
    return Registry(store, base_manifest(), frozenset(), TRUST)


def upload(store: BlobStore, seed: int = 0) -> tuple[Path, str]:
    path = write_sample(store.quarantine() / f"upload-{seed}", seed)
    return path, digest_of(path)


def test_the_worked_example_of_the_document() -> None:
    """docs/expert-file.md shows this one."""
    document = (Path(__file__).parents[2] / "docs" / "expert-file.md").read_text("utf-8")
    digest = "e0ea9aec408080ba548434d5765e44128bb335dc47a74c72e14a01b7598105fe"
    text = ADA.sign(digest)
    assert digest in document
    assert text in document
    assert parse_signature(text).fits(digest)


def test_a_signature_is_of_one_file() -> None:
    signature = parse_signature(ADA.sign(DIGEST))
    assert signature.key == ADA.raw
    assert signature.fits(DIGEST)
    assert not signature.fits("cd" * 32)
    assert not Signature(MALLORY.raw, signature.value).fits(DIGEST)
    assert not Signature(bytes(32), signature.value).fits(DIGEST)
    assert parse_signature(f"{signature}\n") == signature


@given(st.integers(0, 95), st.integers(1, 255))
def test_any_other_byte_makes_it_another_one(place: int, change: int) -> None:
    signature = parse_signature(ADA.sign(DIGEST))
    data = bytearray(signature.key + signature.value)
    data[place] ^= change
    assert not Signature(bytes(data[:32]), bytes(data[32:])).fits(DIGEST)


@given(st.text(max_size=250) | st.binary(max_size=250).map(lambda data: data.decode("latin-1")))
def test_whatever_is_sent_is_refused_cleanly(text: str) -> None:
    with pytest.raises(SignatureError) as caught:
        parse_signature(text)
    assert caught.value.param == "signature"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ed25519",
        "rsa a b",
        "ed25519 !! !!",
        "ed25519 QUE= QUE=",
        ADA.sign(DIGEST) + " x",
        ADA.sign(DIGEST) + "\n\n",
    ],
)
def test_what_is_no_signature(text: str) -> None:
    with pytest.raises(SignatureError):
        parse_signature(text)


def test_beside_a_file(tmp_path: Path) -> None:
    file = tmp_path / "e.safetensors"
    assert read_beside(file) is None
    (tmp_path / "e.safetensors.sig").write_text(ADA.sign(DIGEST) + "\n")
    assert read_beside(file) == ADA.sign(DIGEST)
    for bad in (b"x" * 1000, b"\xff"):
        (tmp_path / "e.safetensors.sig").write_bytes(bad)
        with pytest.raises(SignatureError):
            read_beside(file)
    with pytest.raises(SignatureError):
        decode_signature("é".encode())


def test_trusted_keys_inline_and_in_files(tmp_path: Path) -> None:
    listed = tmp_path / "keys"
    listed.write_text(f"# ours\n\n{ADA.line}\n")
    assert trusted_keys([str(listed), MALLORY.line]) == {ADA.raw: "ada@example.org", MALLORY.raw: "mallory"}
    nameless = MALLORY.line.rsplit(" ", 1)[0]
    assert trusted_keys([nameless]) == {MALLORY.raw: fingerprint(MALLORY.raw)}
    for bad in (
        "ssh-ed25519 AAAA x",
        "ssh-rsa AAAA",
        str(tmp_path / "none"),
        "ssh-ed25519 " + base64.b64encode(b"x" * 51).decode(),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            trusted_keys([bad])
        assert caught.value.param == "trusted_keys"
    with pytest.raises(InvalidRequestError, match="needs trusted_keys"):
        Trust(required=True)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen here")
def test_fingerprints_are_those_of_ssh(tmp_path: Path) -> None:
    (tmp_path / "k.pub").write_text(ADA.line)
    shown = subprocess.run(["ssh-keygen", "-lf", tmp_path / "k.pub"], capture_output=True, text=True, check=True).stdout
    assert fingerprint(ADA.raw) in shown


def test_only_signed_experts_come_in(store: BlobStore, registry: Registry) -> None:
    path, digest = upload(store)
    for signature, kind, code in (
        (None, UntrustedError, "signature_required"),
        (MALLORY.sign(digest), UntrustedError, "untrusted"),
        (ADA.sign(DIGEST), SignatureError, "invalid_signature"),
        ("nonsense", SignatureError, "invalid_signature"),
    ):
        with pytest.raises(kind) as caught:
            registry.publish(path, name="a", signature=signature)
        assert (caught.value.code, caught.value.param) == (code, "signature")
    assert store.records() == {}
    assert store.blobs() == set()
    record, created = registry.publish(path, name="a", signature=ADA.sign(digest))
    assert created
    assert registry.list() == [record]
    assert registry.trust.signer(record) == ADA_SIGNER


def test_without_the_demand_they_are_checked_all_the_same(store: BlobStore) -> None:
    registry = Registry(store, base_manifest(), frozenset(), Trust(trusted_keys([ADA.line])))
    path, digest = upload(store)
    with pytest.raises(UntrustedError, match=re.escape(fingerprint(MALLORY.raw))):
        registry.publish(path, name="a", signature=MALLORY.sign(digest))
    first, _ = registry.publish(path, name="a")
    assert registry.trust.signer(first) is None
    path, _ = upload(store)
    signed, created = registry.publish(path, name="a", signature=ADA.sign(digest))
    assert not created, "the expert was there; only its signature is new"
    assert registry.get("a") == signed
    assert signed.earlier == ()
    assert registry.trust.signer(signed) == ADA_SIGNER
    path, _ = upload(store)
    assert registry.publish(path, name="a") == (signed, False), "a signature is not taken away"
    anybody = Registry(store, base_manifest(), frozenset())
    path, other = upload(store, 1)
    record, _ = anybody.publish(path, name="b", signature=MALLORY.sign(other))
    assert anybody.trust.signer(record) == Signer(None, fingerprint(MALLORY.raw))


def test_who_writes_to_the_store_smuggles_nothing_in(store: BlobStore, registry: Registry, opener: Opener) -> None:
    """A Redis that anybody can write to: records are believed only as far as a signature goes."""
    lax = Registry(elsewhere := opener(), base_manifest(), frozenset())
    path, signed = upload(store)
    good, _ = registry.publish(path, name="good", signature=ADA.sign(signed))
    path, unsigned = upload(elsewhere, 1)
    lax.publish(path, name="bad")

    def smuggle(name: str, **changes: object) -> None:
        document = json.loads(elsewhere.get_record("bad") or b"")
        data = json.dumps(document | {"name": name} | changes).encode()
        elsewhere.put_record(name, data, expected=ANYTHING)

    smuggle("evil-1", signature=ADA.sign(signed))
    smuggle("evil-2", signature=MALLORY.sign(unsigned))
    smuggle("evil-3", signature="ed25519 x y")
    smuggle("evil-4", signature=str(Signature(ADA.raw, parse_signature(MALLORY.sign(unsigned)).value)))
    with store.exclusive():  # sees the latest
        assert [record.name for record in registry.list()] == ["good"]
    for name in ("bad", "evil-1", "evil-2", "evil-3", "evil-4"):
        with pytest.raises(UntrustedError, match="not signed"):
            registry.get(name)
    smuggle("good")
    with store.exclusive(), pytest.raises(UntrustedError):
        registry.get("good")
    elsewhere.put_record("good", json.dumps({"name": "good"}).encode(), expected=ANYTHING)
    assert store.blobs() >= {good.digest, unsigned}
    registry.collect_garbage(0)
    assert store.blobs() >= {good.digest, unsigned}, "damaged and untrusted records keep their bytes"


def test_versions_and_aliases_are_no_way_round(store: BlobStore, registry: Registry) -> None:
    lax = Registry(store, base_manifest(), frozenset())
    path, old = upload(store)
    lax.publish(path, name="a")
    path, new = upload(store, 1)
    registry.publish(path, name="a", replace=True, signature=ADA.sign(new))
    registry.alias_changes.put("x", "a")
    with pytest.raises(UntrustedError, match="that version"):
        registry.roll_back("a", old)
    assert registry.get("x").digest == new
    lax.roll_back("a", old)
    with pytest.raises(UntrustedError):
        registry.get("x")
    registry.roll_back("a", new)
    assert registry.get("x").digest == new
    path, _ = upload(store)
    registry.publish(path, name="b", signature=ADA.sign(old))
    assert {record.name for record in registry.list()} == {"a", "b"}


def test_only_who_owns_an_expert_signs_it_anew(store: BlobStore, registry: Registry) -> None:
    """Else anybody could take a public one out of service where signatures must be trusted."""
    lax = Registry(store, base_manifest(), frozenset())
    acme, globex = (Caller(name, name, frozenset({Role.UPLOAD})) for name in ("acme", "globex"))
    path, digest = upload(store)
    signed, _ = lax.publish(path, name="a", signature=ADA.sign(digest), by=acme)
    public = lax.set_access("a", AccessChange(Visibility.PUBLIC))
    for signature in (None, ADA.sign(digest)):
        assert lax.publish(upload(store)[0], name="a", signature=signature, by=globex) == (public, False)
    with pytest.raises(NotPermittedError):
        lax.publish(upload(store)[0], name="a", signature=MALLORY.sign(digest), by=globex)
    assert lax.get("a").signature == signed.signature
    assert registry.list() == [public]
    again, _ = lax.publish(upload(store)[0], name="a", signature=MALLORY.sign(digest), by=acme)
    assert again.signature != signed.signature
