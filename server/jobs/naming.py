"""What a job's expert may be called: known before anything is compressed, not hours later."""

from __future__ import annotations

from server.library import Library
from store.access import OPERATOR, Caller
from store.errors import ConflictError, ExpertUnavailableError, NotFoundError, UntrustedError
from store.names import Names
from store.ownership import check_name_free


async def check_name(library: Library, name: str, by: Caller, *, replace: bool, reserved: frozenset[str]) -> None:
    """Whether a caller may publish under a name, as far as can be told: publishing looks again, and at the file.

    A name of the caller's own may be taken without `replace`: the same file may come out again.

    Args:
        reserved: names that mean something else; see `Names`.

    Raises:
        InvalidRequestError: the name is malformed or reserved.
        ConflictError: somebody else's expert has it, or it is an alias.
        NotPermittedError: the expert may be used, but not replaced.
    """
    Names(reserved).check(name)
    try:
        record = await library.get(name, OPERATOR)
    except (NotFoundError, ExpertUnavailableError, UntrustedError):  # there is none, or none to look at
        return
    if record.name != name and by.sees(record.access):
        raise ConflictError(
            f"{name} is an alias of {record.name}: use that name, or remove the alias", param="name", code="is_alias"
        )
    check_name_free(name, record, by, is_taken=True, replace=replace)
