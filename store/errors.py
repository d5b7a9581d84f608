"""The one exception tree of the project. The API maps it to status codes in one place (`server/api/errors.py`)."""

from __future__ import annotations

from collections.abc import Mapping


class SwitchyardError(Exception):
    """Root of every error we raise on purpose. The message is written for the user and safe to show.

    Attributes:
        param: the request field or file part at fault, where there is one.
        code: a short machine-readable word, in OpenAI's style.
    """

    code: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequestError(SwitchyardError):
    """The caller sent something we cannot act on (400)."""

    code = "invalid_request"


class ContextLengthError(InvalidRequestError):
    """Prompt plus requested tokens do not fit the context (400)."""

    code = "context_length_exceeded"


class ChatTemplateError(InvalidRequestError):
    """The model has no chat template, or it refuses these messages (400)."""

    code = "chat_template_error"


class ExpertFileError(InvalidRequestError):
    """An expert file is corrupt, hostile or unsupported; `param` names the tensor or header field (400)."""

    code = "invalid_expert_file"


class WrongBaseError(ExpertFileError):
    """The expert was made for another base model (400)."""

    code = "wrong_base"


class CheckpointError(InvalidRequestError):
    """A checkpoint folder cannot be read as a fine-tune of the base (400)."""

    code = "invalid_checkpoint"


class SignatureError(InvalidRequestError):
    """A signature is malformed, or not that of the file (400)."""

    code = "invalid_signature"

    def __init__(self, message: str) -> None:
        super().__init__(message, param="signature")


class UntrustedError(SwitchyardError):
    """An expert is not signed by a key that this server trusts (403)."""

    code = "untrusted"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message, param="signature", code=code)


class MissingPackageError(SwitchyardError):
    """Something optional was asked for that is not installed here (501)."""

    code = "not_installed"


class AuthenticationError(SwitchyardError):
    """No valid API key (401)."""

    code = "invalid_api_key"


class NotPermittedError(SwitchyardError):
    """The caller may not do this (403)."""

    code = "not_permitted"


class QuotaExceededError(NotPermittedError):
    """The tenant keeps as much as it may (403)."""

    code = "quota_exceeded"


class NotFoundError(SwitchyardError):
    """No such model or expert (404)."""

    code = "model_not_found"


class ConflictError(SwitchyardError):
    """The name is taken by another expert (409)."""

    code = "name_taken"


class TooLargeError(SwitchyardError):
    """The body exceeds a configured byte limit (413)."""

    code = "payload_too_large"


class RateLimitError(SwitchyardError):
    """The key or its tenant has spent what it may for now; `retry_after` says when to come again, in seconds (429)."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: int = 1, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.headers = headers or {}


class QueueFullError(SwitchyardError):
    """Too many requests wait; `retry_after` says when to come again, in seconds (429)."""

    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ExpertUnavailableError(SwitchyardError):
    """A registered expert cannot be loaded now: its bytes are gone, damaged or exceed the budget (503)."""

    code = "expert_unavailable"


class ExpertRemovedError(ExpertUnavailableError):
    """An expert was removed between being found and being used; whoever looks again finds what is there now (503)."""


class ExpertDamagedError(ExpertUnavailableError):
    """A registered expert's bytes are not what they were, and no sound copy is at hand (503)."""

    code = "expert_damaged"


class StoreError(SwitchyardError):
    """The store failed: no permission, a broken disk, damaged bytes (503)."""

    code = "store_error"


class StoreUnavailableError(StoreError):
    """The store cannot be reached now, or does not answer; what is local is served on (503)."""

    code = "store_unavailable"


class StorageFullError(StoreError):
    """The store has no room for more bytes; nothing of the upload is kept (507)."""

    code = "storage_full"


class ClosingError(SwitchyardError):
    """The server is shutting down, and will not finish this (503)."""

    code = "shutting_down"


class EngineDeadError(SwitchyardError):
    """The engine's thread has failed; the server must be restarted (503)."""

    code = "engine_dead"
