"""`POST /v1/embeddings`."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from typing_extensions import TypedDict

from server.api.schema import prompts_of, shape_of_prompt
from server.api.services import Asker, ReadyServices, Services
from server.api.streaming import until_disconnect
from server.api.wire import OnlyNeutral, Text, Token, Wire
from store.access import Caller
from store.errors import InvalidRequestError

MAX_INPUTS = 256

router = APIRouter()


_Line = Annotated[Text, Field(min_length=1)]
_Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Inputs = Annotated[
    Annotated[_Line, Tag("text")]
    | Annotated[list[_Line], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag("texts")]
    | Annotated[_Tokens, Tag("tokens")]
    | Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag("token_lists")],
    Discriminator(shape_of_prompt),
]
"""One or several, as text or as token ids."""


class EmbeddingBody(Wire):
    """The body of `POST /v1/embeddings`."""

    model: Text = Field(description="The base's name.")
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = Field("float", description="base64: little-endian float32.")
    user: str | None = Field(None, description="Accepted and not used.")
    dimensions: Annotated[None, OnlyNeutral()] = None


class Embedding(TypedDict):
    """One text's vector, of length 1."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Tokens spent."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    """The vectors of all texts, in their order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@router.post("/v1/embeddings")
async def create_embeddings(
    body: EmbeddingBody, request: Request, services: ReadyServices, asker: Asker
) -> EmbeddingList:
    """Vectors of texts: the mean of the base's hidden states after the layers that routing looks at."""
    await _check_model(body.model, services, asker)
    tokens = [await services.encoder.encode(prompt) for prompt in prompts_of(body.input, "input")]
    if not all(tokens):
        raise InvalidRequestError("an empty text has no embedding", param="input")
    vectors = await until_disconnect(request.receive, services.engine.embed(tokens, asker.tenant))
    count = sum(map(len, tokens))
    services.meter.charge(asker, prompt_tokens=count)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, body.encoding_format)}
            for i, vector in enumerate(_of_length_one(vectors))
        ],
        "model": body.model,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


async def _check_model(model: str, services: Services, by: Caller) -> None:
    """Embeddings must not change with the experts that come and go.

    Raises:
        InvalidRequestError: the model is an expert or `auto`.
        NotFoundError: there is no such model.
    """
    base = services.engine.base.name
    if model == base:
        return
    await services.generation.check_model(model, by)
    raise InvalidRequestError(f"embeddings come from the base alone: set model to {base!r}", param="model")


def _of_length_one(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    unit: npt.NDArray[np.float32] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _encoded(vector: npt.NDArray[np.float32], form: str | None) -> list[float] | str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()
