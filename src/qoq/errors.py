"""One exception class per cause; every message says what is wrong and what to do about it."""


class QoqError(Exception):
    """Base of every error a user can cause. The CLI prints its text and exits with status 1."""


class SchemeError(QoqError):
    """A scheme or recipe name that cannot be parsed, or a combination that does not exist."""


class UnsupportedModelError(QoqError):
    """A model feature (architecture, RoPE type, norm layout) that would be computed wrongly."""


class SourceError(QoqError):
    """A Hugging Face folder that cannot be read: missing, truncated or in a refused format."""


class CheckpointError(QoqError):
    """A packed checkpoint that must not be loaded. Subclasses name the cause."""


class CheckpointIncompleteError(CheckpointError):
    """A file is missing, truncated, or the checkpoint was never finished."""


class CheckpointVersionError(CheckpointError):
    """The format version or quant_method is not one this program reads."""


class CheckpointTensorError(CheckpointError):
    """A tensor is missing, unexpected, or has the wrong shape or dtype."""


class CheckpointValueError(CheckpointError):
    """A tensor holds values the format forbids: NaN scales, groups that overflow int8, ..."""


class CheckpointPathError(CheckpointError):
    """A file name in the index points outside the checkpoint's folder."""


class BackendUnavailable(QoqError):
    """A backend asked for by name cannot run here; the message names the cause."""


class CalibrationError(QoqError):
    """Calibration text is missing, unreadable or too short."""


class TextError(QoqError):
    """A text to evaluate on that is missing, unreadable, too short or for another vocabulary."""


class HarnessError(QoqError):
    """lm-evaluation-harness, one of its tasks or the data of one is missing or cannot be used."""


class ResourceError(QoqError):
    """The job cannot fit in the memory or disk at hand; nothing was started."""


class KVCacheFullError(QoqError):
    """No free page is left in the KV cache; release or preempt a sequence and try again."""


class RequestError(QoqError):
    """A generation request that cannot be honoured: too long, bad sampling parameters, ...

    ``param``: the field of the request that it is about, where there is one; ``code``: a short name
    that programs may know.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ServerError(QoqError):
    """A server that cannot be reached, refuses a request or breaks off.

    ``kind`` is a short name to count by: connect, timeout, http_503, stream_error, broken_stream.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind
