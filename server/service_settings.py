"""Settings of the service: what it serves, to whom and within which limits. The model's are in `server.settings`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.access_settings import is_loopback, keys_in
from store.tenants import Limits


def _xdg(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default) / "switchyard"


class ServiceSettings(BaseSettings):
    """What a server has to do with the world around it."""

    # Keys must not show in the message of a validation error.
    model_config = SettingsConfigDict(env_prefix="SWITCHYARD_", env_ignore_empty=True, hide_input_in_errors=True)

    base: str = Field(description="The base model: a checkpoint folder, a GGUF file or a hub id.")
    base_name: str | None = Field(
        None, min_length=1, max_length=200, description="What clients call the base; default: the last part of BASE."
    )
    data_dir: Path = Field(
        default_factory=lambda: _xdg("XDG_DATA_HOME", ".local/share"),
        description="Folder of the experts; what is in it survives restarts.",
    )
    store: str | None = Field(
        None,
        description="Where experts are kept instead: redis://HOST:PORT/DB, which several servers may share.",
    )
    store_cache_bytes: ByteSize = Field(
        ByteSize(10 << 30), gt=0, description="Disk for a cache of the experts in Redis, below CACHE_DIR."
    )
    gc_grace: float = Field(
        3600.0,
        ge=0,
        le=1e9,
        description="Seconds that the bytes of removed experts and versions are kept; what runs on them can finish.",
    )
    cache_dir: Path = Field(
        default_factory=lambda: _xdg("XDG_CACHE_HOME", ".cache"),
        description="Folder of what can be made again: a converted base, fingerprints, routing features.",
    )

    host: str = Field("127.0.0.1", description="Address to listen on; anything but loopback needs API keys.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_keys: Annotated[frozenset[SecretStr], NoDecode] = Field(
        frozenset(), description="Administrators' API keys, separated by commas, to make others with (switchyard keys)."
    )
    api_keys_file: Path | None = Field(
        None, description="A file of administrators' API keys, one a line, beside API_KEYS: a mounted secret."
    )
    allow_anonymous: bool = Field(
        False, description="Listen beyond loopback while there is no API key: anyone may do anything."
    )

    console: bool = Field(True, description="Serve the console, a page for people, at /.")
    watch: Path | None = Field(
        None, description="A folder whose expert files (*.safetensors) are served as they appear, change and vanish."
    )
    sources: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(),
        description="Buckets and repositories whose expert files are served, separated by commas: hf://org/repo, "
        "s3://bucket/experts.",
    )
    hub_allow: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(),
        description="Prefixes that SOURCES and `switchyard pull` may read below, separated by commas: hf://org, "
        "s3://bucket.",
    )
    sources_seconds: float = Field(300.0, ge=1, le=86400, description="Pause between two looks at SOURCES.")
    download_seconds: float = Field(600.0, ge=1, le=86400, description="What a download out of SOURCES may take.")
    trusted_keys: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(),
        description="Whose signatures count: OpenSSH ed25519 public keys or files of them, separated by commas.",
    )
    require_signature: bool = Field(
        False, description="Neither take nor serve experts that no trusted key has signed, whoever wrote to the store."
    )
    tenant_requests_per_minute: int | None = Field(
        None, ge=0, description="What a tenant may ask for, unless it has limits of its own; default: no limit."
    )
    tenant_tokens_per_minute: int | None = Field(
        None, ge=0, description="Tokens of a tenant's prompts and answers, unless it has limits of its own."
    )
    tenant_max_experts: int | None = Field(
        None, ge=0, description="Experts that a tenant may keep, unless it has limits of its own."
    )
    tenant_max_bytes: ByteSize | None = Field(
        None, ge=0, description="Bytes of a tenant's expert files, unless it has limits of its own."
    )

    max_upload_bytes: ByteSize = Field(
        ByteSize(2 << 30), gt=0, description="Largest upload of an expert, e.g. 500MB or 2GiB."
    )
    upload_bytes: ByteSize = Field(
        ByteSize(64 << 30), gt=0, description="What resumable uploads may take on disk together, below DATA_DIR."
    )
    max_uploads: int = Field(64, ge=1, description="Most resumable uploads at a time.")
    upload_hours: float = Field(
        24.0, gt=0, le=8760, description="How long a resumable upload is kept after its last byte."
    )
    max_jobs: int = Field(8, ge=1, description="Most fine-tunes that wait to be compressed, or are being so.")
    job_memory: ByteSize | None = Field(
        None, gt=0, description="Memory of a job's process; default: 4GiB and 16 bytes per parameter of the base."
    )
    job_hours: float = Field(6.0, gt=0, le=720, description="How long a job may take.")
    max_body_bytes: ByteSize = Field(ByteSize(8 << 20), gt=0, description="Largest body of every other request.")
    body_bytes: ByteSize = Field(
        ByteSize(256 << 20),
        ge=2 << 20,
        description="Memory for bodies of requests, of all together; a body's first 16 KiB do not count.",
    )
    max_requests: int = Field(
        2048, ge=1, description="Most requests at a time, waiting ones included, before the server answers 503."
    )
    client_seconds: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="How long a client may take for the head of a request, pause in its body or not read its answer.",
    )
    max_n: int = Field(16, ge=1, description="Largest `n` of one request.")
    max_sequences: int = Field(128, ge=1, description="Most answers one request may ask for: prompts × n.")

    lora_dirs: Annotated[frozenset[Path], NoDecode] = Field(
        frozenset(), description="Folders, separated by commas, below which /v1/load_lora_adapter may be told to look."
    )
    drain_seconds: int = Field(
        30, ge=0, le=86400, description="Seconds that answers in progress get on SIGTERM; the rest ends with an error."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="What is logged: lines for people, or JSON with one object for every request as well."
    )
    otel_endpoint: str | None = Field(
        None, description="Where OpenTelemetry traces go, such as http://collector:4318; needs the extra otel."
    )

    @field_validator("api_keys", "trusted_keys", "sources", "hub_allow", "lora_dirs", mode="before")
    @classmethod
    def _split_list(cls, value: object) -> object:
        if isinstance(value, str):
            return frozenset(part.strip() for part in value.split(",") if part.strip())
        return value

    @model_validator(mode="after")
    def _check_keys(self) -> ServiceSettings:
        if self.api_keys_file is not None:
            self.api_keys |= keys_in(self.api_keys_file)
        if any(not key.get_secret_value().strip() for key in self.api_keys):
            raise ValueError("an API key is empty")
        return self

    @model_validator(mode="after")
    def _check_bodies(self) -> ServiceSettings:
        if self.body_bytes < self.max_body_bytes:
            raise ValueError(f"body_bytes must be at least max_body_bytes, {self.max_body_bytes}")
        return self

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def may_run_open(self) -> bool:
        """Whether everyone who reaches the server may do anything, as long as there is no key."""
        return not self.api_keys and (self.on_loopback or self.allow_anonymous)

    @property
    def served_base_name(self) -> str:
        """What clients call the base."""
        return self.base_name or Path(self.base).name.removesuffix(".gguf")

    def tenant_limits(self) -> Limits:
        """Limits of tenants with none of their own."""
        most = self.tenant_max_bytes
        return Limits(
            self.tenant_requests_per_minute,
            self.tenant_tokens_per_minute,
            self.tenant_max_experts,
            None if most is None else int(most),
        )
