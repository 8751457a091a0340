"""The client's connection to one gateway: requests, streams, and errors in our own terms.

`client.jobs` and `client.api` are the calls that go over it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx

from pilotlight.client.discovery import Access, check_url
from pilotlight.client.errors import AccessError, GatewayError, GatewayUnreachableError, error_of

CONNECT_S = 5.0
ANSWER_S = 30.0
"""Longest silence after an ordinary question."""

Query = Mapping[str, str | int]


class Transport:
    """A connection to one gateway.

    Args:
        url: Base URL, such as `http://127.0.0.1:8400`.
        key: API key; None sends none, which the gateway will refuse.
        key_source: Where the key came from, for the message of a refused key.

    Raises:
        InvalidInputError: The URL cannot be used.
    """

    def __init__(self, url: str, key: str | None = None, *, key_source: str = "") -> None:
        check_url(url, "url")
        self.url = url.rstrip("/")
        self._key_source = key_source
        self._http = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=timeout_of(ANSWER_S),
            trust_env=not is_loopback(self.url),
            follow_redirects=False,
        )

    @classmethod
    def of(cls, access: Access) -> Self:
        """A client for what `find_access` found."""
        return cls(access.url, access.key, key_source=access.key_source)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection; calls in other threads end with an error."""
        self._http.close()

    def _list(self, path: str, name: str, query: Query | None = None) -> list[Any]:
        items = self._json("GET", path, query=query).get(name)
        if not isinstance(items, list):
            raise GatewayError(
                f"{self.url}{path} answered without a list `{name}`; is this a Pilotlight gateway?"
            )
        return items

    def _json(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
        read_s: float = ANSWER_S,
    ) -> dict[str, Any]:
        response = self._request(method, path, body, query=query, headers=headers, read_s=read_s)
        return self._object(response.content, path)

    def _object(self, content: bytes, path: str) -> dict[str, Any]:
        try:
            value = json.loads(content)
        except ValueError as error:
            raise GatewayError(
                f"{self.url}{path} did not answer with JSON; is this a Pilotlight gateway?"
            ) from error
        if not isinstance(value, dict):
            raise GatewayError(
                f"{self.url}{path} did not answer with a JSON object; is this a Pilotlight gateway?"
            )
        return value

    def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
        read_s: float = ANSWER_S,
    ) -> httpx.Response:
        with self._translated(path):
            response = self._http.request(
                method, path, json=body, params=query, headers=headers, timeout=timeout_of(read_s)
            )
        self._check(response)
        return response

    @contextlib.contextmanager
    def _stream(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
        read_s: float,
    ) -> Iterator[httpx.Response]:
        request = self._http.build_request(
            method, path, json=body, params=query, headers=headers, timeout=timeout_of(read_s)
        )
        with self._translated(path):
            response = self._http.send(request, stream=True)
        try:
            if response.status_code >= 300:
                with self._translated(path):
                    response.read()
                self._check(response)
            yield response
        finally:
            response.close()

    def _check(self, response: httpx.Response) -> None:
        if response.status_code < 300:
            return
        if response.status_code < 400:
            where = response.headers.get("location", "elsewhere")
            raise GatewayError(f"{self.url} redirects to {where}; set the URL to where the gateway really is")
        if response.status_code == 401 and "authorization" not in self._http.headers:
            raise AccessError(
                f"the gateway at {self.url} wants a key, and there is {self._key_source or 'none'}"
            )
        raise error_of(response, key_source=self._key_source)

    @contextlib.contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        """Turn transport errors into ours, with the advice that fits."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            message = f"no gateway at {self.url}; start one with `pilotlight up`"
            raise GatewayUnreachableError(message) from error
        except httpx.TimeoutException as error:
            raise GatewayUnreachableError(
                f"the gateway at {self.url} did not answer {path} in time"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            message = f"the connection to {self.url} broke during {path}: {error or type(error).__name__}"
            raise GatewayUnreachableError(message) from error


def is_loopback(url: str) -> bool:
    """Whether a URL points to this machine, so that no proxy may come between."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def timeout_of(read_s: float) -> httpx.Timeout:
    """Time limits of one call: ours, and the longest silence before and within the answer."""
    return httpx.Timeout(connect=CONNECT_S, read=read_s, write=ANSWER_S, pool=ANSWER_S)


def path_part(value: str) -> str:
    """A value as one segment of a path."""
    return quote(value, safe="")
