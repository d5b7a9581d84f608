"""Every setting of the server, once: a command-line flag and an environment variable `SWITCHYARD_*` each."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import ByteSize, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.access_settings import is_loopback, keys_in
from server.engine.options import BaseWeights, EngineSettings, Mode
from server.tools.use import ToolFormat, format_of, knows_tools
from store.tenants import Limits

if TYPE_CHECKING:
    from router.settings import RouterSettings


def _xdg(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default) / "switchyard"


class Settings(BaseSettings):
    """How one server runs. Values come from keyword arguments first, then from `SWITCHYARD_*`."""

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

    dtype: str = Field(
        EngineSettings.dtype,
        description="Type of the weights: auto (float32 on a CPU, bfloat16 on a GPU), float32, bfloat16, float16.",
    )
    device: str = Field(EngineSettings.device, description="Where the base runs: auto, cpu, cuda, cuda:1, ...")
    kv_bytes: ByteSize = Field(
        ByteSize(EngineSettings.kv_bytes), gt=0, description="Memory for the key/value cache, e.g. 1GiB."
    )
    prefix_cache: bool = Field(
        EngineSettings.prefix_cache, description="Compute what prompts of one mix and tenant begin with once."
    )
    expert_bytes: ByteSize = Field(
        ByteSize(EngineSettings.expert_bytes), gt=0, description="Device memory for decoded experts, e.g. 2GiB."
    )
    host_expert_bytes: ByteSize | None = Field(
        None,
        ge=0,
        description="Host memory for decoded experts that leave the device; default: 0 on a CPU, 4 × EXPERT_BYTES on a "
        "GPU.",
    )
    mode: Mode = Field(
        EngineSettings.mode,
        description="How experts are applied: merged (one mix at a time, folded into the weights), mixed (rows of "
        "different mixes share steps, deltas beside the weights) or auto (whichever costs less, by measurement).",
    )
    base_weights: BaseWeights = Field(
        EngineSettings.base_weights,
        description="What the base is kept as: full (DTYPE), int8 or int4; quantised, MODE must be mixed.",
    )
    kernels: str = Field(
        EngineSettings.kernels, description="What computes mixed mode: auto (the fastest that runs here) or by name."
    )
    tool_parser: Literal["auto", "hermes", "llama3_json", "mistral", "none"] = Field(
        "auto", description="How the base writes calls of tools: auto (by its chat template), by name, or none."
    )
    max_batch: int = Field(EngineSettings.max_batch, ge=1, description="Most sequences in one step.")
    max_queue: int = Field(
        EngineSettings.max_queue, ge=1, description="Most requests waiting or running before the server answers 429."
    )
    step_tokens: int = Field(
        EngineSettings.step_tokens,
        ge=1,
        description="Most tokens in one step: bounds how long a long prompt can hold up running streams.",
    )
    turn_steps: int = Field(
        EngineSettings.turn_steps, ge=1, description="Steps a mix may run merged while another mix waits for its turn."
    )
    threads: int | None = Field(
        EngineSettings.threads, ge=1, description="CPU threads of the engine; default: torch's choice."
    )
    feature_layer: int = Field(
        EngineSettings.feature_layer,
        ge=0,
        description="How many layers of the base routing features pass through, at most all.",
    )
    feature_tokens: int = Field(
        EngineSettings.feature_tokens, ge=1, description="Most tokens of a prompt that routing looks at."
    )

    router_mode: Literal["top1", "soft"] = Field(
        "top1", description="What a routed prompt gets: top1, the one expert with most votes, or soft, a weighted mix."
    )
    router_metric: Literal["discriminant", "flex", "plain"] = Field(
        "discriminant",
        description="Under which distances routing compares: a learned discriminant, Auto-FlexSwitch's loss, or plain.",
    )
    router_votes: Literal["inverse", "count"] = Field(
        "inverse", description="What a neighbour's vote weighs: 1 / distance, or one each."
    )
    router_centres: int = Field(20, ge=1, description="Most K-Means centres per expert.")
    router_neighbours: int = Field(10, ge=1, description="Nearest centres that a prompt is compared with.")
    router_min_share: float = Field(
        0.2, ge=0, le=1, description="Soft mixes leave out experts with a smaller share of the votes."
    )
    router_steps: int = Field(5, ge=1, description="Weights of soft mixes are multiples of 1/STEPS.")
    router_quantile: float = Field(
        0.98, ge=0.75, le=1, description="Share of an expert's held-out exemplars that lie within its reach."
    )
    router_margin: float = Field(3.0, gt=0, lt=1e6, description="Factor on every reach; larger accepts more prompts.")
    router_shadow: float = Field(
        0.0, ge=0, le=1, description="Share of the requests naming an expert that are routed too, for /metrics alone."
    )
    harvest_exemplars: int = Field(
        0, ge=0, le=512, description="Make stored exemplars of prompts that name an expert, up to so many; 0: never."
    )
    routing_wait: float = Field(
        0.05,
        ge=0,
        le=600,
        description="Seconds that an upload waits for the router to learn its exemplars; the rest is done behind it.",
    )
    router_max_exemplars: int = Field(512, ge=1, description="Exemplars beyond, evenly spread, are left out.")

    @field_validator("api_keys", "trusted_keys", "sources", "hub_allow", "lora_dirs", mode="before")
    @classmethod
    def _split_list(cls, value: object) -> object:
        if isinstance(value, str):
            return frozenset(part.strip() for part in value.split(",") if part.strip())
        return value

    @model_validator(mode="after")
    def _check_keys(self) -> Settings:
        if self.api_keys_file is not None:
            self.api_keys |= keys_in(self.api_keys_file)
        if any(not key.get_secret_value().strip() for key in self.api_keys):
            raise ValueError("an API key is empty")
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

    def tool_format(self, template: str) -> ToolFormat | None:
        """How a base with this chat template writes calls of tools; None if it cannot call any."""
        if self.tool_parser == "auto":
            return format_of(template)
        return ToolFormat(self.tool_parser) if self.tool_parser != "none" and knows_tools(template) else None

    def engine(self) -> EngineSettings:
        """The engine's part of the settings."""
        return EngineSettings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(EngineSettings)})

    def router(self) -> RouterSettings:
        """The router's part of the settings; the rest of it is not for users to choose."""
        from router.metric import MetricKind  # the router brings FAISS, which the command line does without
        from router.mix import MixMode, Votes
        from router.settings import RouterSettings

        return RouterSettings(
            mode=MixMode(self.router_mode),
            metric=MetricKind(self.router_metric),
            votes=Votes(self.router_votes),
            # Exemplars are shown in other words where a background keeps those words from speaking for anyone.
            frames=0 if self.router_metric == "plain" else RouterSettings.frames,
            centres=self.router_centres,
            neighbours=self.router_neighbours,
            min_share=self.router_min_share,
            steps=self.router_steps,
            quantile=self.router_quantile,
            margin=self.router_margin,
            max_exemplars=self.router_max_exemplars,
        )
