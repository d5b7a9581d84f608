"""What Schemathesis cannot know of this API by itself. Loaded by its command line, not by pytest."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import schemathesis
from jsonschema import Draft202012Validator

PIECE = "application/offset+octet-stream"

BEYOND_A_SCHEMA: dict[str, dict[str, str]] = {
    "POST /v1/chat/completions": {
        r"messages\[\d+\]\.tool_calls\[\d+\]\.function\.arguments": "a string that holds a JSON object",
        r"experts\[\d+\]\.id|tools\[\d+\]\.function\.name": "of several objects no two may have the same name",
        r"tool_choice\.function\.name": "is one of those in tools",
        r"tools": "whether the base can call any",
        r"max_tokens|min_tokens": "compared with other numbers of the request, and with the base's context",
        r"response_format|structured_outputs": "a grammar in a language of its own",
        r"logit_bias|stop_token_ids": "the base's vocabulary",
        r"experts": "goes with the base's name, which is a setting",
        r"messages": "the tokens of all of it, with the base's tokenizer, against its context",
    },
    "POST /v1/completions": {
        r"experts\[\d+\]\.id": "of several objects no two may have the same name",
        r"max_tokens|min_tokens": "compared with other numbers of the request, and with the base's context",
        r"response_format|structured_outputs": "a grammar in a language of its own",
        r"logit_bias|stop_token_ids": "the base's vocabulary",
        r"experts": "goes with the base's name, which is a setting",
        r"prompt": "the base's vocabulary, tokenizer and context; prompts times n",
    },
    "POST /v1/embeddings": {
        r"input": "the base's vocabulary, tokenizer and context",
        r"model": "the base's name, which is a setting",
    },
    "POST /v1/route": {
        r"messages\[\d+\]\.tool_calls\[\d+\]\.function\.arguments": "a string that holds a JSON object",
    },
    "POST /tokenize": {
        r"messages\[\d+\]\.tool_calls\[\d+\]\.function\.arguments": "a string that holds a JSON object",
    },
    "POST /detokenize": {r"tokens": "the base's vocabulary"},
    "POST /v1/experts": {r"(code) invalid_expert_file": "what is in a file"},
    "PUT /v1/experts/{name}": {r"(code) invalid_expert_file": "what is in a file"},
    "PUT /v1/experts/{name}/access": {r"owner": "a private expert has an owner, or gets one: depends on the expert"},
    "PUT /v1/aliases/{alias}": {r"target": "is not the alias itself: a body compared with its path"},
    "POST /v1/admin/keys": {r"expires": "compared with the clock"},
    "POST /v1/jobs": {r"(code) parent_not_found": "which experts there are"},
    "POST /v1/uploads": {
        r"Upload-Length|(code) invalid_json": "a body, or headers in its place: OpenAPI knows no such choice",
        r"Upload-Metadata|filename|sha256": "what is in base64",
    },
}
"""Which parameters, or codes, of which routes may be refused although the description allows them, and why no JSON
Schema could say so."""

COMBINED = 4
"""Rules between fields of one object that Schemathesis can take into account: it multiplies their cases out."""

published: dict[str, Any] = {}
"""The description as the server gives it."""


@schemathesis.serializer(PIECE)
def pieces(_: Any, value: Any) -> bytes:
    """A piece of an upload is bytes as they are."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


@schemathesis.hook
def before_load_schema(_: Any, raw_schema: dict[str, Any]) -> None:
    """Set some of the rules aside where there are too many. Requests that break those are made and judged here."""
    published.update(copy.deepcopy(raw_schema))
    for schema in raw_schema["components"]["schemas"].values():
        if len(schema.get("allOf", ())) > COMBINED:
            schema["allOf"] = schema["allOf"][-COMBINED:]


@schemathesis.hook
def map_case(_: Any, case: Any) -> Any:
    """Valid requests name what there is: otherwise nearly all would end at 404. And 1.0 is no integer here, which no
    JSON Schema can say."""
    if not is_positive(case) or not isinstance(case.body, dict):
        return case
    case.body = body = with_integers(case.body)
    if isinstance(body.get("model"), str) and body["model"] != "auto":
        body["model"] = "dummy-base"
    for expert, name in zip(body.get("experts") or (), ("cron", "french"), strict=False):
        expert["id"] = name
    if (body.get("routing") or {}).get("allow"):
        body["routing"]["allow"] = ["cron"]
    return case


@schemathesis.hook
def filter_failure(_: Any, failure: Any, case: Any, response: Any) -> bool:
    """Whether a failure is one: a refusal of what the description allows, unless it is listed above."""
    if type(failure).__name__ != "RejectedPositiveData":
        return True
    return not (breaks_a_rule(case) or is_beyond_a_schema(case.operation.label, response))


@schemathesis.check
def what_the_description_forbids_is_refused(_: Any, response: Any, case: Any) -> None:
    """Also by the rules that were set aside."""
    assert response.status_code >= 400 or not breaks_a_rule(case), "the published description forbids this request"


def with_integers(value: Any) -> Any:
    """A copy in which whole numbers are integers."""
    if isinstance(value, dict):
        return {key: with_integers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_integers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_positive(case: Any) -> bool:
    return case.meta is not None and case.meta.generation.mode.is_positive


def is_beyond_a_schema(route: str, response: Any) -> bool:
    error = json.loads(response.content)["error"]
    told = f"{error['param']}", f"(code) {error['code']}"
    return response.status_code == 400 and any(
        re.fullmatch(pattern.replace("(code)", r"\(code\)"), one)
        for pattern in BEYOND_A_SCHEMA.get(route, ())
        for one in told
    )


def breaks_a_rule(case: Any) -> bool:
    """Whether the published description forbids the body of a request that Schemathesis knows fewer rules of."""
    body = published["paths"][case.operation.path][case.method.lower()].get("requestBody", {})
    schema = body.get("content", {}).get("application/json", {}).get("schema", {})
    if case.media_type != "application/json" or "$ref" not in schema:
        return False
    validator = Draft202012Validator(schema | {"components": published["components"]})
    return not validator.is_valid(case.body)
