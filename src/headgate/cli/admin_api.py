"""Asks Anthropic's Admin API for the usage and cost report, page by page.

What it is: a few GETs by the standard library, with the admin key, which the gateway never has. Follows no redirect,
since that would carry the key elsewhere. What is read is bounded: 32 MiB an answer, 400 pages.
What it is not: a client of anything else.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import IO, TypeVar

import msgspec

from headgate.wire.usage_report import (
    ADMIN_KEY_PREFIX,
    CostPage,
    ReportedCost,
    ReportedUsage,
    ReportError,
    UsagePage,
    cost_path,
    decode_cost_page,
    decode_usage_page,
    usage_path,
)

VERSION = "2023-06-01"
TIMEOUT_S = 60.0
BYTES_MAX = 32 << 20
PAGES_MAX = 400
KEY_HELP = (
    "It must be an admin key of the organization (sk-ant-admin…), which only an admin can make: "
    "https://platform.claude.com/settings/admin-keys. An API key for messages (sk-ant-api…) does not read reports"
)

Page = TypeVar("Page", UsagePage, CostPage)


class ReportUnreadable(Exception):
    """The report cannot be had. The text says why, and how to mend it."""


class AdminApi:
    """The reports of one organization."""

    def __init__(self, url: str, key: str) -> None:
        """`url` is that of the API, without a path. Raises ReportUnreadable for what cannot be an admin key."""
        if not key:
            raise ReportUnreadable(f"ANTHROPIC_ADMIN_KEY is not set. {KEY_HELP}.")
        if not key.startswith(ADMIN_KEY_PREFIX) or not key.isascii() or not key.isprintable():
            raise ReportUnreadable(f"ANTHROPIC_ADMIN_KEY is no admin key. {KEY_HELP}.")
        self._url = url.rstrip("/")
        self._headers = {"x-api-key": key, "anthropic-version": VERSION, "user-agent": "headgate"}
        self._opener = urllib.request.build_opener(_NoRedirect())

    def usage(self, *, first_day: int, end_day: int) -> tuple[ReportedUsage, ...]:
        """Tokens of the UTC days [first_day, end_day). Raises ReportUnreadable."""
        pages = self._pages(lambda page: usage_path(first_day=first_day, end_day=end_day, page=page), decode_usage_page)
        return tuple(row for page in pages for row in page.rows)

    def costs(self, *, first_day: int, end_day: int) -> tuple[ReportedCost, ...]:
        """Dollars of the UTC days [first_day, end_day). Raises ReportUnreadable."""
        pages = self._pages(lambda page: cost_path(first_day=first_day, end_day=end_day, page=page), decode_cost_page)
        return tuple(row for page in pages for row in page.rows)

    def _pages(self, path: Callable[[str], str], decode: Callable[[bytes], Page]) -> list[Page]:
        pages: list[Page] = []
        cursors = {""}
        cursor = ""
        while True:
            try:
                pages.append(decode(self._get(path(cursor))))
            except ReportError as error:
                raise ReportUnreadable(f"{self._url}: {error}.") from None
            cursor = pages[-1].next_page
            if not cursor:
                return pages
            if cursor in cursors or len(pages) == PAGES_MAX:
                raise ReportUnreadable(f"{self._url}: the pages of the report do not end.")
            cursors.add(cursor)

    def _get(self, path: str) -> bytes:
        # The scheme is http or https: the settings hold it to that.
        request = urllib.request.Request(self._url + path, headers=self._headers)  # noqa: S310
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                body: bytes = answer.read(BYTES_MAX + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise ReportUnreadable(self._refused(error)) from None
        except urllib.error.URLError as error:
            raise ReportUnreadable(f"{self._url} does not answer: {error.reason}.") from None
        except (OSError, http.client.HTTPException) as error:
            raise ReportUnreadable(f"{self._url}: the answer broke off: {error!r}.") from None
        if len(body) > BYTES_MAX:
            raise ReportUnreadable(f"{self._url}: a page of the report is above {BYTES_MAX >> 20} MiB.")
        return body

    def _refused(self, error: urllib.error.HTTPError) -> str:
        try:
            said = msgspec.json.decode(error.read(BYTES_MAX), type=_Refusal).error.message
        except (msgspec.DecodeError, UnicodeDecodeError, OSError, http.client.HTTPException):
            said = error.reason
        text = f"{self._url} refused the report with {error.code}: {said}."
        if error.code in (401, 403):
            return f"{text} Look at ANTHROPIC_ADMIN_KEY. {KEY_HELP}."
        if error.code == 429 or error.code >= 500:
            return f"{text} Try again in a few minutes."
        return text


class _RefusalError(msgspec.Struct):
    message: str


class _Refusal(msgspec.Struct):
    error: _RefusalError


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> None:
        """No request: the redirect becomes an HTTPError."""
