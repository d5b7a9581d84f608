"""What is asked of every client, in the order of the table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Feature:
    """One row of the matrix.

    Attributes:
        id: the name of the function that checks it, in each client's module.
        refused: the server must say no, by name, and the client must tell so in its own way.
    """

    id: str
    what: str
    refused: bool = False


FEATURES = (
    Feature("example", "the example in docs/clients.md"),
    Feature("models", "list and look up models"),
    Feature("chat", "chat"),
    Feature("chat_stream", "chat, streamed"),
    Feature("stream_usage", "usage in the last chunk (`stream_options`)"),
    Feature("chat_logprobs", "chat: `logprobs`, `top_logprobs`"),
    Feature("several", "`n`"),
    Feature("stop", "`stop`"),
    Feature("seed", "`seed`"),
    Feature("penalties", "`frequency_penalty`, `presence_penalty`"),
    Feature("logit_bias", "`logit_bias`"),
    Feature("json_object", "`response_format`: `json_object`"),
    Feature("json_schema", "`response_format`: `json_schema`"),
    Feature("tools", "`tools`, and a call answered"),
    Feature("tools_stream", "`tools`, streamed"),
    Feature("experts", "an explicit mix of experts"),
    Feature("auto", "`model: auto`"),
    Feature("completions", "completions"),
    Feature("completions_stream", "completions, streamed"),
    Feature("echo", "`echo` with log-probabilities of the prompt"),
    Feature("token_prompts", "prompts as token ids, and lists of them"),
    Feature("embeddings", "embeddings"),
    Feature("tokenizer", "the server's tokenizer"),
    Feature("cancel", "a stream given up stops the engine"),
    Feature("auth", "a wrong API key: the client's own error"),
    Feature("unknown_model", "an unknown model: the client's own error"),
    Feature("context_length", "a prompt that is too long: `context_length_exceeded`"),
    Feature("broken_stream", "an error in the middle of a stream is raised"),
    Feature("best_of", "`best_of`", refused=True),
    Feature("suffix", "`suffix`", refused=True),
    Feature("images", "images in messages", refused=True),
    Feature("unknown", "a parameter that nobody knows", refused=True),
    Feature("responses", "the Responses API", refused=True),
)

BY_ID = {feature.id: feature for feature in FEATURES}
