"""Server-sent events out of bytes, however these are cut."""

from __future__ import annotations

# A server that never ends a line must not fill the memory.
MAX_EVENT_BYTES = 64 * 2**20


class EventDecoder:
    """The data of whole events; comments and other fields are dropped. Lines may end in LF, CRLF or CR."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._data: list[bytes] = []
        self._num_bytes = 0
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that end in these bytes. Raises ValueError for an event above 64 MiB."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
            self._after_cr = False
        if not data:
            return []
        self._after_cr = data.endswith(b"\r")
        self._num_bytes += len(data)
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *ended, rest = data.split(b"\n")
        events: list[bytes] = []
        for part in ended:
            self._line += part
            self._end_line(bytes(self._line), events)
            self._line.clear()
        self._line += rest
        if self._num_bytes > MAX_EVENT_BYTES:
            raise ValueError(f"an event has more than {MAX_EVENT_BYTES} bytes")
        return events

    def _end_line(self, line: bytes, events: list[bytes]) -> None:
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
            self._num_bytes = 0
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
