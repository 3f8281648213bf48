"""API keys: each is a tenant."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from weft.serve.server.errors import HttpError


class Keys:
    """The keys that are taken, kept as digests: what looking one up tells by its time is of those, which nobody steers."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._tenants = {hashlib.sha256(key.encode()).digest(): str(number) for number, key in enumerate(keys)}

    def tenant(self, authorization: str) -> str:
        """Which key came; "" where none is needed.

        Args:
            authorization: the header or the metadata of that name.

        Raises:
            HttpError: 401, none that is taken.
        """
        if not self._tenants:
            return ""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        tenant = self._tenants.get(digest)
        if scheme.lower() != "bearer" or tenant is None:
            raise HttpError(
                401, "no valid API key came: send Authorization: Bearer KEY", "invalid_api_key",
                {"www-authenticate": "Bearer"},
            )  # fmt: skip
        return tenant
