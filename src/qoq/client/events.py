"""Server-sent events out of bytes, however the network cuts them."""


class EventParser:
    """Bytes in, the ``data`` of finished events out.

    Lines end at CR, LF or both and nowhere else: a text may hold characters that Unicode also calls
    line ends, and servers send them as they are.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def push(self, chunk: bytes) -> list[str]:
        """The events that ``chunk`` completes, in order."""
        held = self._rest + chunk
        # A CR at the very end may be the first half of CR LF.
        tail = b"\r" if held.endswith(b"\r") else b""
        lines = held[: len(held) - len(tail)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *complete, rest = lines.split(b"\n")
        self._rest = rest + tail
        found = []
        for line in complete:
            if not line:
                if self._data:
                    found.append("\n".join(self._data))
                self._data = []
                continue
            field, _, value = line.partition(b":")
            if field == b"data":  # comments, names and ids say nothing to us
                self._data.append(value.removeprefix(b" ").decode("utf-8", "replace"))
        return found
