"""API keys: who may use an HTTP front. Keys are kept as hashes, and stand in no message, log or series."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers

from engine.errors import ConfigError
from service.errors import Unauthorized
from service.settings import ServiceSettings

log = logging.getLogger(__name__)

# How often the file is looked at: a key that is taken out is refused after this time at the latest.
CHECK_PERIOD_S = 2.0
MAX_FILE_BYTES = 2**20
MAX_KEYS = 1000
# What cannot be guessed over HTTP, and fits into a header.
_KEY = re.compile(r"[\x21-\x7e]{16,512}")
_BEARER = re.compile(r"bearer +([\x21-\x7e]+) *", re.IGNORECASE)


class ApiKeys:
    """The keys from a file, one a line, and from a comma-separated list. Lines that begin with # are comments.

    The file is read again when it changes. One that cannot be used then leaves the keys as they were, and the log says
    why: a half-written file must not lock everybody out.
    """

    def __init__(self, file: str | None, listed: str | None) -> None:
        """Raises ConfigError when a source is given that has no key or a bad one."""
        self._path = None if file is None else Path(file)
        self._listed = frozenset[bytes]()
        if listed is not None:
            self._listed = _digests([key.strip() for key in listed.split(",")], "M3SERVE_API_KEYS", "entry")
        self._stamp = None if self._path is None else _stamp(self._path)
        self._from_file = frozenset[bytes]() if self._path is None else _read(self._path)
        self._checked_s = time.monotonic()

    @classmethod
    def of(cls, settings: ServiceSettings) -> ApiKeys | None:
        """None: no key is needed. Raises ConfigError."""
        listed = settings.api_keys
        if settings.api_key_file is None and listed is None:
            return None
        return cls(settings.api_key_file, None if listed is None else listed.get_secret_value())

    def check(self, headers: Headers) -> None:
        """Raise Unauthorized unless `Authorization: Bearer KEY` has a key of ours."""
        self._refresh()
        given = headers.getlist("authorization")
        found = _BEARER.fullmatch(given[0]) if len(given) == 1 else None
        if found is None:
            raise Unauthorized("an API key is needed, as Authorization: Bearer KEY", code="invalid_api_key")
        if not self._holds(found[1]):
            raise Unauthorized("the API key is not valid", code="invalid_api_key")

    def __len__(self) -> int:
        return len(self._listed | self._from_file)

    def _holds(self, key: str) -> bool:
        """Whether it is one of ours, in a time that tells nothing about them."""
        digest = _digest(key)
        found = False
        for known in self._listed | self._from_file:
            found |= hmac.compare_digest(digest, known)
        return found

    def _refresh(self) -> None:
        now_s = time.monotonic()
        if self._path is None or now_s - self._checked_s < CHECK_PERIOD_S:
            return
        self._checked_s = now_s
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        # Kept even when the content is bad: one line in the log per change.
        self._stamp = stamp
        try:
            self._from_file = _read(self._path)
        except ConfigError as error:
            log.error("%s; the keys of before stay valid", error)
        else:
            log.warning("api_key_file %s has changed: %d keys are valid now", self._path, len(self))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does, also behind a symbolic link as Kubernetes mounts secrets; None: no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _read(path: Path) -> frozenset[bytes]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"api_key_file {path} cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"api_key_file {path} is larger than {MAX_FILE_BYTES} bytes")
    lines = content.decode("latin-1").splitlines()
    return _digests([line.strip() for line in lines], f"api_key_file {path}", "line")


def _digests(keys: Iterable[str], source: str, place: str) -> frozenset[bytes]:
    """Hashes of the keys; a bad one is named by its place, never quoted."""
    found = set()
    for number, key in enumerate(keys, start=1):
        if not key or key.startswith("#"):
            continue
        if not _KEY.fullmatch(key):
            raise ConfigError(
                f"{source}: {place} {number} is no key: 16 to 512 printable ASCII characters without spaces"
            )
        found.add(_digest(key))
    if not found:
        raise ConfigError(f"{source} holds no key")
    if len(found) > MAX_KEYS:
        raise ConfigError(f"{source} holds {len(found)} keys, at most {MAX_KEYS} are allowed")
    return frozenset(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("ascii")).digest()
