"""`POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import Field
from typing_extensions import TypedDict

from server.api.schema import PromptBody
from server.api.services import ReadyServices
from server.api.wire import Text, Token, Wire
from server.engine.types import Tokenizer
from store.errors import InvalidRequestError

router = APIRouter()


class TokenizeBody(PromptBody):
    """The body of `POST /tokenize`: a text or a conversation."""

    model: Text | None = Field(None, description="Any; all experts share the base's tokenizer.")
    add_special_tokens: bool | None = Field(
        None, description="What the model puts around plain text, such as a BOS; default: as completions do."
    )
    return_token_strs: bool | None = Field(False, description="Also tell what each token stands for.")

    def split(self, tokenizer: Tokenizer) -> tuple[list[int], list[str] | None]:
        """The tokens, and what each of them stands for if that is asked for. Takes a while."""
        if self.prompt is not None and self.add_special_tokens is False:
            tokens = tokenizer.encode(self.prompt, special=False)
        else:
            tokens = self.to_prompt().encode(tokenizer)
        if not self.return_token_strs:
            return tokens, None
        return tokens, [tokenizer.token_bytes(token).decode(errors="replace") for token in tokens]


class DetokenizeBody(Wire):
    """The body of `POST /detokenize`."""

    model: Text | None = Field(None, description="Any; all experts share the base's tokenizer.")
    tokens: list[Token] = Field(fail_fast=True)


class Tokens(TypedDict):
    """A text in tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    """A text, special tokens included."""

    prompt: str


class TokenizerInfo(TypedDict):
    """What a client must know to make prompts by itself, as in a `tokenizer_config.json`."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    model_max_length: int


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, services: ReadyServices) -> Tokens:
    """The token ids of a text, or of a conversation in the chat template."""
    tokens, shown = await services.encoder.apart(body.split)
    return {
        "count": len(tokens),
        "max_model_len": services.engine.base.context_length,
        "tokens": tokens,
        "token_strs": shown,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, services: ReadyServices) -> Detokenized:
    """The text of token ids."""
    if max(body.tokens, default=0) >= services.engine.base.vocabulary:
        raise InvalidRequestError(f"token ids must be below {services.engine.base.vocabulary}", param="tokens")
    spelled = await services.encoder.apart(lambda tokenizer: b"".join(map(tokenizer.token_bytes, body.tokens)))
    return {"prompt": spelled.decode(errors="replace")}


@router.get("/tokenizer_info")
async def tokenizer_info(services: ReadyServices) -> TokenizerInfo:
    """The base's special tokens and chat template; evaluation harnesses then need no tokenizer of their own."""
    tokenizer = services.engine.tokenizer
    special = tokenizer.special_tokens
    return {
        "bos_token": special.get("bos_token"),
        "eos_token": special.get("eos_token"),
        "pad_token": special.get("pad_token"),
        "unk_token": special.get("unk_token"),
        "chat_template": tokenizer.chat_template or None,
        "model_max_length": services.engine.base.context_length,
    }
