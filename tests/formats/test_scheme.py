"""Scheme names: one spelling, parsed and printed."""

import itertools

import pytest

from qoq.errors import SchemeError
from qoq.formats.scheme import (
    DEFAULT_SCHEME,
    FLOAT_SCHEME,
    KVFormat,
    QuantScheme,
    WeightFormat,
)


def all_names() -> list[str]:
    weights = [("w4", g) for g in ("", "-g32", "-g64", "-g128")] + [("w8", ""), ("w16", "")]
    bits = (4, 8, 16)
    kvs = [f"kv{b}" for b in (4, 8)] + [f"k{k}v{v}" for k in bits for v in bits if k != v] + [""]
    return [f"{w}a{a}{kv}{g}" for (w, g), a, kv in itertools.product(weights, (8, 16), kvs)]


def test_names_are_canonical() -> None:
    names = all_names()
    assert len(set(names)) == 6 * 2 * 9
    for name in names:
        scheme = QuantScheme.parse(name)
        assert scheme.name == str(scheme) == name
        assert QuantScheme.parse(scheme.name) == scheme
        assert QuantScheme.parse(f" {name.upper()}\n") == scheme


def test_parts() -> None:
    scheme = QuantScheme.parse("w4a8k8v4-g64")
    assert scheme.weight == WeightFormat(4, 64)
    assert scheme.act_bits == 8
    assert scheme.kv == KVFormat(8, 4)
    assert scheme.lm_head == WeightFormat(8)
    assert DEFAULT_SCHEME.name == "w4a8kv4-g128"
    assert QuantScheme.parse("w16a16kv16") == FLOAT_SCHEME
    assert QuantScheme.parse("w4a8").kv == KVFormat(16, 16)


@pytest.mark.parametrize(
    ("name", "bits", "want"),
    [
        ("w4a8kv4", None, 8),
        ("w8a8", None, 8),
        ("w4a16", None, 16),
        ("w16a8", None, 16),
        ("w4a8kv4", 16, 16),
        ("w16a16", 8, 8),
    ],
)
def test_lm_head_bits(name: str, bits: int | None, want: int) -> None:
    assert QuantScheme.parse(name, lm_head_bits=bits).lm_head.bits == want


@pytest.mark.parametrize(
    "name",
    [
        "",
        "w4",
        "w3a8",
        "w4a4",
        "w4a8kv2",
        "w4a8kv4-g256",
        "w4a8kv4g128",
        "w4a8kv4-g128 ,",
        "xw4a8",
        "w8a8-g128",
        "w16a16-g32",
        "w4a8k4",
        "w4a8v4",
        "w4a8kv4\nw4a8",
    ],
)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(SchemeError):
        QuantScheme.parse(name)


def test_unknown_name_shows_the_grammar() -> None:
    with pytest.raises(SchemeError, match="w4a8kv4-g128"):
        QuantScheme.parse("int4")


def test_bad_combinations_are_refused() -> None:
    for build in (
        lambda: WeightFormat(5),
        lambda: WeightFormat(8, 128),
        lambda: WeightFormat(4, 48),
        lambda: KVFormat(4, 5),
        lambda: KVFormat(2, 4),
        lambda: QuantScheme(WeightFormat(4), 4, KVFormat(4, 4), WeightFormat(8)),
        lambda: QuantScheme.parse("w4a8kv4", lm_head_bits=4),
    ):
        with pytest.raises(SchemeError):
            build()


def test_with_kv_changes_only_the_cache() -> None:
    scheme = QuantScheme.parse("w4a8kv4-g32", lm_head_bits=16)
    other = scheme.with_kv(KVFormat(8, 8))
    assert other.name == "w4a8kv8-g32"
    assert other.with_kv(scheme.kv) == scheme
