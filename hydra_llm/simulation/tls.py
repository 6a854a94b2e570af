"""TLS for the connections of a simulated node."""

from __future__ import annotations

import contextlib
import ssl

__all__ = ["Tls"]


class Tls:
    """The server's side of one TLS connection, without a socket: bytes in, bytes out."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._is_ready = False

    def decrypt(self, data: bytes) -> bytes:
        """Take bytes from the network; `ssl.SSLError` for what is no TLS or an unhappy client."""
        self._incoming.write(data)
        said = b""
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            if not self._is_ready:
                self._object.do_handshake()
                self._is_ready = True
            while part := self._object.read(65536):
                said += part
        return said

    def encrypt(self, data: bytes) -> bytes:
        """Give the bytes for the network."""
        self._object.write(data)
        return self.pending()

    def pending(self) -> bytes:
        """Give what TLS itself has to say: its part of the handshake, an alert."""
        return self._outgoing.read()

    def farewell(self) -> bytes:
        """Give the bytes that end the connection in order."""
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()
        return self.pending()
