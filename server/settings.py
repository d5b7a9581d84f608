"""Every setting of the server, once: a command-line flag and an environment variable `SWITCHYARD_*` each."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from pydantic import ByteSize, Field

from server.engine.options import BaseWeights, CudaGraphs, EngineSettings, Mode, NativeCalls
from server.service_settings import ServiceSettings
from server.tools.use import ToolFormat, format_of, knows_tools

if TYPE_CHECKING:
    from router.settings import RouterSettings


class Settings(ServiceSettings):
    """How one server runs. Values come from keyword arguments first, then from `SWITCHYARD_*`.

    Those of the service (`server.service_settings`), and of how the model runs and requests are routed.
    """

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
    merged_bytes: ByteSize = Field(
        ByteSize(EngineSettings.merged_bytes),
        ge=0,
        description="Device memory for the merged weights of hot mixes: each takes as much as the base's. One is kept "
        "whatever it takes, unless MODE is mixed.",
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
    cuda_graphs: CudaGraphs = Field(
        EngineSettings.cuda_graphs,
        description="Decode steps as CUDA graphs: auto (on a GPU, where capturing works) or off.",
    )
    native_steps: NativeCalls = Field(
        EngineSettings.native_steps,
        description="Steps on a CPU as one native call: auto (where it can be built for the base) or off.",
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
    prefill_share: float = Field(
        EngineSettings.prefill_share,
        ge=0,
        description="By what part of its time a newcomer's prompt may lengthen a step of running streams; 0: no bound.",
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
