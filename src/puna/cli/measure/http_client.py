"""A small HTTP/1.1 client for the benchmark: one request per connection, the answer's lines as they come.

It reads what streaming servers send: chunked bodies, bodies with a length, and bodies that end with the
connection (RFC 9112). A body that ends too early is an error, never a short answer. It follows no redirects
and uses no proxy, so that what is measured is the server and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from puna.errors import ParameterError, PunaError

_LINE_LIMIT = 1 << 20  # bytes of a header line
_PIECE = 1 << 16


class HTTPError(Exception):
    """Say what went wrong on the way to an answer; the request failed, others may not."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server listens, and the path in front of its routes."""

    host: str
    port: int
    path: str
    is_secure: bool

    @classmethod
    def from_url(cls, url: str) -> Address:
        """Read http://host:port/path. Raises ParameterError for anything else."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ParameterError(f"base_url {url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ParameterError(f"base_url must be like http://127.0.0.1:8000, got {url!r}")
        is_secure = parts.scheme == "https"
        return cls(
            host=parts.hostname,
            port=port or (443 if is_secure else 80),
            path=parts.path.rstrip("/"),
            is_secure=is_secure,
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_secure else 'http'}://{host}:{self.port}{self.path}"


class Answer:
    """A status, and a body that can be read once."""

    def __init__(self, status: int, reason: str, body: AsyncGenerator[bytes, None]) -> None:
        self.status = status
        self.reason = reason
        self._body = body

    async def read(self) -> bytes:
        """Return the whole body."""
        return b"".join([piece async for piece in self._body])

    async def lines(self) -> AsyncGenerator[str, None]:
        """Yield the lines of the body as soon as each is whole, without their ends."""
        rest = b""
        async for piece in self._body:
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                yield line.removesuffix(b"\r").decode("utf-8", errors="replace")
        if rest:
            yield rest.decode("utf-8", errors="replace")

    async def close(self) -> None:
        """Read no further."""
        await self._body.aclose()


async def connect(address: Address) -> None:
    """Connect and leave again. Raises PunaError when no server is there."""
    try:
        _, writer = await _open(address)
    except HTTPError as error:
        raise PunaError(str(error)) from None
    writer.close()


async def _open(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = ssl.create_default_context() if address.is_secure else None
    try:
        return await asyncio.open_connection(address.host, address.port, limit=_LINE_LIMIT, ssl=context)
    except OSError as error:
        raise HTTPError(f"cannot connect to {address}: {_reason(error)}") from error


@asynccontextmanager
async def open_answer(
    address: Address, route: str, *, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> AsyncIterator[Answer]:
    """Send a GET, or a POST of JSON where there is a body, and give the answer once its headers are there.

    Raises HTTPError when there is no server, or what it sends is not HTTP.
    """
    request = _request(address, route, body, headers or {})
    reader, writer = await _open(address)
    try:
        writer.write(request)
        await writer.drain()
        answer = await _read_head(reader)
        try:
            yield answer
        finally:
            await answer.close()
    except asyncio.IncompleteReadError:
        raise HTTPError("the server closed the connection in the middle of the answer") from None
    except OSError as error:
        raise HTTPError(f"the connection broke: {_reason(error)}") from error
    except (asyncio.LimitOverrunError, ValueError) as error:
        raise HTTPError(f"the answer is not HTTP: {error}") from error
    finally:
        writer.close()


def _reason(error: OSError) -> str:
    """Return the system's words; asyncio puts its own in their place."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error)


def _request(address: Address, route: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
    host = f"[{address.host}]" if ":" in address.host else address.host
    fields = {"Host": f"{host}:{address.port}", "Connection": "close", "Accept": "*/*", **headers}
    if body is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    for name, value in fields.items():
        if "\r" in value or "\n" in value:
            raise ParameterError(f"the header {name} must be one line")
    lines = [f"{'GET' if body is None else 'POST'} {address.path}{route} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


async def _read_head(reader: asyncio.StreamReader) -> Answer:
    version, _, rest = (await _read_line(reader)).partition(" ")
    code, _, reason = rest.partition(" ")
    if not version.startswith("HTTP/") or not code.isdigit():
        raise ValueError(f"it begins with {(version + ' ' + rest)[:80]!r}")
    headers: dict[str, str] = {}
    while line := await _read_line(reader):
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return Answer(int(code), reason, _read_body(reader, headers))


async def _read_line(reader: asyncio.StreamReader) -> str:
    return (await reader.readuntil(b"\n")).decode("latin-1").rstrip("\r\n")


async def _read_body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncGenerator[bytes, None]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await _read_line(reader)).partition(";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        while await _read_line(reader):
            pass  # trailers
    elif "content-length" in headers:
        left = int(headers["content-length"])
        while left:
            piece = await reader.read(min(left, _PIECE))
            if not piece:
                raise asyncio.IncompleteReadError(b"", left)
            left -= len(piece)
            yield piece
    else:
        while piece := await reader.read(_PIECE):
            yield piece
