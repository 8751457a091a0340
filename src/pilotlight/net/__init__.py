"""Requests to addresses that strangers have named: webhooks, buckets."""

from __future__ import annotations

from pilotlight.net.addresses import refusal
from pilotlight.net.guarded import Answer, GuardedHttp, RefusedAddressError, UnreachableError

__all__ = ["Answer", "GuardedHttp", "RefusedAddressError", "UnreachableError", "refusal"]
