"""What experts and aliases may be called."""

from __future__ import annotations

from store.errors import InvalidRequestError
from store.expert_info import NAME_PATTERN


class Names:
    """The rules for names.

    Args:
        reserved: names that mean something else: the base's own, "auto".
    """

    def __init__(self, reserved: frozenset[str]) -> None:
        self._reserved = reserved

    def check(self, name: str) -> str:
        """The name, if it may be one.

        Raises:
            InvalidRequestError: it is malformed or reserved.
        """
        if not NAME_PATTERN.fullmatch(name):
            raise InvalidRequestError(
                "a name has 1 to 64 characters: lower-case letters, digits, '.', '_' and '-', the first one a letter "
                "or a digit",
                param="name",
            )
        if name in self._reserved:
            raise InvalidRequestError(f"the name {name} is reserved; choose another", param="name")
        return name
