"""How strict what clients send is read: what all bodies are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_TOKEN = 2**31 - 1


class Wire(BaseModel):
    """Base of everything a client sends."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class OnlyNeutral:
    """Marks a parameter of OpenAI's that is not supported yet: only values that ask for nothing are accepted."""

    def __init__(self, *values: object) -> None:
        self.values = (None, *values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        del source, handler
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        del schema, handler
        return {"enum": list(self.values), "description": "Not supported yet."}

    def _check(self, value: object) -> object:
        if any(value == neutral for neutral in self.values):
            return value
        raise PydanticCustomError("unsupported_parameter", "not supported")


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair; no tokenizer and no answer can
        raise PydanticCustomError("invalid_value", "not valid Unicode: it holds half a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]

Token = Annotated[int, Field(ge=0, le=MAX_TOKEN)]
"""A token id; whether the base has such a token is for the engine to say."""


def fault(param: str, message: str) -> PydanticCustomError:
    """A fault that shows only when fields are seen together; `errors.py` reads the parameter's name."""
    return PydanticCustomError("invalid_value", "{what}", {"param": param, "what": message})
