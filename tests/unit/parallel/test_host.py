"""Tests of the settings of the host's allocator."""

import sys

from mea_jax.parallel import host


def test_keep_freed_memory_says_whether_it_could():
    assert host.keep_freed_memory() is sys.platform.startswith("linux")
