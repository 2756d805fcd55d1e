"""What every test shares: no network, no flaky deadlines."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download fails instead

from hypothesis import settings

settings.register_profile("qoq", deadline=None)
settings.load_profile("qoq")
