"""Names of full pages: a chain of hashes, so that a key says all tokens up to a page's end."""

import hashlib
from array import array
from collections.abc import Sequence

KEY_BYTES = 16


def root_key(salt: str = "") -> bytes:
    """What a chain begins with; chains of different ``salt`` never share a key."""
    return hashlib.blake2b(salt.encode(), digest_size=KEY_BYTES, person=b"qoq salt").digest()


def extend_keys(
    keys: list[bytes], root: bytes, ids: Sequence[int], page_size: int, stop: int
) -> None:
    """Append the keys of the full pages of ids[:stop] that ``keys`` does not hold yet.

    A page's key is a hash (BLAKE2, 128 bits: nobody finds two texts of equal key) of the key before
    it and of its own ``page_size`` ids.
    """
    for page in range(len(keys), stop // page_size):
        own = array("q", ids[page * page_size : (page + 1) * page_size]).tobytes()
        parent = keys[-1] if keys else root
        keys.append(hashlib.blake2b(parent + own, digest_size=KEY_BYTES).digest())
