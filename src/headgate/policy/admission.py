"""Decides whether a request may be sent at all: does the key allow it.

Rates, budgets and the queue join here; each answers `Refused` with its reason or leaves its reservation in `Admitted`.
"""

from __future__ import annotations

from headgate.policy.records import Admitted, Principal, Refused, Scope


def admit(principal: Principal, *, scope: Scope, model: str | None) -> Admitted | Refused:
    """Whether this principal may use this scope and model. `model` is None where the request is about none."""
    if scope not in principal.scopes and not (scope == "messages" and "app" in principal.scopes):
        return Refused(
            status=403,
            error_type="permission_error",
            error_code="scope_missing",
            message=f"This key does not have the scope '{scope}'.",
        )
    if model is not None and principal.models and model not in principal.models:
        return Refused(
            status=403,
            error_type="permission_error",
            error_code="model_not_allowed",
            message=f"This key may not use the model '{model}'. It may use: {', '.join(principal.models)}.",
        )
    return Admitted()
