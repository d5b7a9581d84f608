"""How many replicas Ray Serve shall run, and on what. Knows nothing of Ray."""

from __future__ import annotations

from pydantic import ByteSize, Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class RaySettings(BaseSettings):
    """How many replicas, and on what. Values come from arguments first, then from `SWITCHYARD_RAY_*`."""

    model_config = SettingsConfigDict(env_prefix="SWITCHYARD_RAY_", extra="forbid")

    replicas: int = Field(1, ge=1, description="Replicas to start with, and the fewest there are.")
    max_replicas: int | None = Field(None, ge=1, description="Most replicas; default: no more than at the start.")
    target_requests: float = Field(
        16.0, gt=0, description="Requests in progress per replica: with more, replicas are added, with fewer, removed."
    )
    upscale_delay: float = Field(10.0, ge=0, description="Seconds of too many requests before replicas are added.")
    downscale_delay: float = Field(600.0, ge=0, description="Seconds of too few before replicas are removed.")
    gateways: int = Field(1, ge=1, description="Processes that read requests and hand them on.")
    cpus: float = Field(1.0, ge=0, description="CPUs that Ray sets aside per replica.")
    gpus: float = Field(0.0, ge=0, description="GPUs that Ray sets aside per replica.")
    body_bytes: ByteSize = Field(
        ByteSize(64 << 20), gt=0, description="Largest body: a gateway holds it whole. Larger files come in pieces."
    )
    report_seconds: float = Field(1.0, gt=0, description="How often replicas tell which experts they hold.")
