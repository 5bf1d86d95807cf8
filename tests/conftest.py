"""For all tests: whoever starts a process ends it before the event loop goes with which it was started."""

import weakref
from asyncio.base_subprocess import BaseSubprocessTransport

import pytest

STARTED = weakref.WeakKeyDictionary()  # each to the words that it was started with
begin = BaseSubprocessTransport.__init__


def begin_noted(self, loop, protocol, words, *rest, **options):
    STARTED[self] = words
    begin(self, loop, protocol, words, *rest, **options)


BaseSubprocessTransport.__init__ = begin_noted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown():
    """What is left is told of whenever it happens to be collected, in the middle of a test that has nothing to do with it."""
    yield
    left = [each for each in STARTED if not each._closed and each._loop is not None and each._loop.is_closed()]
    words = [STARTED.pop(each) for each in left]
    assert not words, f"left open by this test, or by one before it in this file: {words}"
