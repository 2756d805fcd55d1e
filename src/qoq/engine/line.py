"""Line: the requests that wait, in order of (priority, arrival)."""

import heapq

from qoq.engine.request import Request


class Line:
    """A heap. Requests that end while they wait stay in it until their turn comes, uncounted."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Request]] = []
        self._count = 0

    def __len__(self) -> int:
        """How many wait."""
        return self._count

    def push(self, request: Request) -> None:
        """Let a request wait at the place that its ``order`` says."""
        heapq.heappush(self._heap, (request.order, request))
        self._count += 1

    def first(self) -> Request | None:
        """Whose turn is next; None: nobody waits."""
        while self._heap and self._heap[0][1].finish_reason is not None:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        """Take out the request that ``first`` has just returned."""
        self._count -= 1
        return heapq.heappop(self._heap)[1]

    def forget(self) -> None:
        """A request that waits has ended (its ``finish_reason`` says so)."""
        self._count -= 1
        # Swept out when most are dead, so that a line that never moves does not grow for ever.
        if len(self._heap) > 2 * self._count + 64:
            self._heap = [entry for entry in self._heap if entry[1].finish_reason is None]
            heapq.heapify(self._heap)
