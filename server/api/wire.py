"""How strict what clients send is read: what all bodies are made of."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from server.api.conditions import Rules

MAX_TOKEN = 2**31 - 1
MAX_DEPTH = 100
"""Of free-form JSON. What is made of it (templates, grammars) goes into each level by a call of its own."""
_SHOWN_CHARACTERS = 64


class Wire(BaseModel):
    """Base of everything a client sends."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    between: ClassVar[Rules] = ()
    """What a class's own validators ask of fields seen together, as far as JSON Schema can say it."""

    @model_validator(mode="before")
    @classmethod
    def _check_count(cls, given: Any) -> Any:
        # pydantic would make an error of each key that is unknown: gigabytes of a body of a megabyte.
        if isinstance(given, dict) and len(given) > len(cls.model_fields):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            unknown = next(str(key) for key in given if key not in known)
            shown = unknown[:_SHOWN_CHARACTERS].encode(errors="replace").decode()
            raise PydanticCustomError("extra_forbidden", "unknown", {"param": f".{shown}"})
        return given

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler, /) -> JsonSchemaValue:
        document = handler(schema)
        if rules := [rule for kind in cls.__mro__ for rule in vars(kind).get("between", ())]:
            handler.resolve_ref_schema(document)["allOf"] = rules
        return document


class OnlyNeutral:
    """Marks a parameter of OpenAI's that is not supported yet: only values that ask for nothing are accepted."""

    def __init__(self, *values: object) -> None:
        self.values = (None, *values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        del source, handler
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        del schema, handler
        plain = [value for value in self.values if not isinstance(value, dict)]
        branches = [{"enum": plain}, *(_exactly(value) for value in self.values if isinstance(value, dict))]
        described = {"description": "Not supported yet."}
        return (branches[0] if len(branches) == 1 else {"anyOf": branches}) | described

    def _check(self, value: object) -> object:
        if any(value == neutral for neutral in self.values):
            return value
        raise PydanticCustomError("unsupported_parameter", "not supported")


def _exactly(value: object) -> JsonSchemaValue:
    """A value as a schema. FastAPI would take nulls out of an object in an enum."""
    if isinstance(value, dict):
        properties = {key: _exactly(item) for key, item in value.items()}
        return {"type": "object", "properties": properties, "required": [*value], "additionalProperties": False}
    return {"enum": [value]}


def check_unicode(text: str) -> str:
    """The text, if it has characters only."""
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair; no tokenizer and no answer can
        raise PydanticCustomError("invalid_value", "not valid Unicode: it holds half a surrogate pair") from None
    return text


def at_most(most: int) -> BeforeValidator:
    """Refuse a list of more items before any of them is looked at. The description does not tell: whoever generates
    requests from it would make lists of that many."""

    def check(items: Any) -> Any:
        if isinstance(items, list) and len(items) > most:
            raise PydanticKnownError(
                "too_long", {"field_type": "List", "max_length": most, "actual_length": len(items)}
            )
        return items

    return BeforeValidator(check)


def check_json(value: Any) -> Any:
    """Free-form JSON, if it is one that can be written into a prompt or a grammar."""
    level = [value]
    for _ in range(MAX_DEPTH):  # level by level: a recursion would fail where this is to refuse
        inner: list[Any] = []
        for item in level:
            if isinstance(item, str):
                check_unicode(item)
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, dict):
                inner += (*item, *item.values())
        if not inner:
            return value
        level = inner
    raise PydanticCustomError("invalid_value", f"nested too deeply: at most {MAX_DEPTH} levels are read")


Text = Annotated[str, AfterValidator(check_unicode)]
FreeForm = Annotated[dict[str, Any], BeforeValidator(check_json)]
"""A JSON object with anything in it."""


Token = Annotated[int, Field(ge=0, le=MAX_TOKEN)]
"""A token id; whether the base has such a token is for the engine to say."""


def fault(param: str, message: str) -> PydanticCustomError:
    """A fault that shows only when fields are seen together; `errors.py` reads the parameter's name."""
    return PydanticCustomError("invalid_value", "{what}", {"param": param, "what": message})
