"""A pytest plugin: tests use the C++ extension file that QOQ_NATIVE names (`make sanitize`)."""

import importlib.util
import os
import sys

_spec = importlib.util.spec_from_file_location("qoq._C", os.environ["QOQ_NATIVE"])
assert _spec is not None
assert _spec.loader is not None
sys.modules["qoq._C"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["qoq._C"])
