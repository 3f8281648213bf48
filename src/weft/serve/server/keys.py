"""API keys: each is a tenant, and some are administrators'."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from weft.serve.server.config import ServerConfig
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


def check_admin(config: ServerConfig, tenant: str, what: str) -> None:
    """
    Args:
        what: it is that the request wants.

    Raises:
        HttpError: 403, the key that came is no administrator's.
    """
    if not config.is_admin(tenant):
        raise HttpError(
            403, f"this API key may not {what}: ask with an administrator's, which is marked so in the server's key file "
            "(weft serve --api-key-file)", "forbidden",
        )  # fmt: skip


def check_priority(config: ServerConfig, tenant: str, priority: int) -> None:
    """
    Raises:
        HttpError: 403, the request would go before other keys', and its key is no administrator's.
    """
    if priority < 0:
        check_admin(config, tenant, f"go before others: priority is {priority}, and it must be 0 or more")
