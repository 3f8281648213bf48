"""API keys: each is a tenant."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from weft.serve.server.errors import HttpError


class Keys:
    """The keys that are taken, kept as digests; all are compared, and it takes as long whatever came."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def tenant(self, authorization: str) -> str:
        """Which key came; "" where none is needed.

        Args:
            authorization: the header or the metadata of that name.

        Raises:
            HttpError: 401, none that is taken.
        """
        if not self._digests:
            return ""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(found):
            raise HttpError(
                401, "no valid API key came: send Authorization: Bearer KEY", "invalid_api_key",
                {"www-authenticate": "Bearer"},
            )  # fmt: skip
        return str(found.index(True))
