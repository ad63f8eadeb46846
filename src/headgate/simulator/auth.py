"""Who calls: keys, and the organization and workspace behind each."""

from collections.abc import Sequence

from headgate.simulator.cache import Scope
from headgate.simulator.errors import ApiError, Rejected
from headgate.simulator.http import Request

DEFAULT_ORGANIZATION = "0f2f0c5e-5d7c-4e6a-9b43-1c0f5a2d7e10"
DEFAULT_WORKSPACE = "wrkspc_01Simulated"
BEARER = "bearer "
ADMIN_PREFIX = "sk-ant-admin"
"""What admin keys begin with. They read the reports of their organization, and call no model."""


class Keys:
    """The keys that are good. Without any, every key is, and all belong to one workspace."""

    def __init__(self, specifications: Sequence[str]) -> None:
        """Each `KEY`, in an organization of its own, or `KEY=ORG/WORKSPACE`; of an admin key `KEY=ORG`."""
        self._scopes: dict[str, Scope] = {}
        for number, specification in enumerate(specifications, start=1):
            key, _, place = specification.partition("=")
            organization, _, workspace = place.partition("/")
            self._scopes[key] = Scope(organization or f"org-{number}", workspace or DEFAULT_WORKSPACE)

    def identify(self, request: Request) -> Scope:
        """The scope of a request's key, from `x-api-key` or `Authorization: Bearer`; Rejected with 401."""
        scope = self._scope(request, admin=False)
        workspace = request.header("anthropic-workspace-id")
        return Scope(scope.organization, workspace) if workspace else scope

    def identify_admin(self, request: Request) -> Scope:
        """The scope of a request to the Admin API; Rejected with 401 for a key that is none for it."""
        return self._scope(request, admin=True)

    def _scope(self, request: Request, *, admin: bool) -> Scope:
        key = request.header("x-api-key")
        if not key:
            authorization = request.header("authorization") or ""
            key = authorization[len(BEARER) :].strip() if authorization.lower().startswith(BEARER) else ""
        if not key:
            raise Rejected(ApiError(401, "x-api-key header is required"))
        scope = self._scopes.get(key) if self._scopes else Scope(DEFAULT_ORGANIZATION, DEFAULT_WORKSPACE)
        if scope is None or key.startswith(ADMIN_PREFIX) is not admin:
            raise Rejected(ApiError(401, "invalid x-api-key"))
        return scope
