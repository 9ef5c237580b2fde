"""A program that signals its own process group once it has told of something: interrupted.py SIGNAL WORDS PROGRAM ...

The moment does not depend on how soon somebody else reads of it.
"""

import os
import runpy
import sys
from typing import Any


class Watched:
    """A stream that sends the signal when the words are written to it."""

    def __init__(self, stream: Any, words: str, number: int):
        self.stream, self.words, self.number = stream, words, number

    def write(self, text: str) -> int:
        written = self.stream.write(text)
        if self.words in text:
            self.stream.flush()
            os.killpg(os.getpgrp(), self.number)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


if __name__ == "__main__":
    number, words, *sys.argv = sys.argv[1:]
    sys.stderr = Watched(sys.stderr, words, int(number))
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # as if it had been launched by its path
    runpy.run_path(sys.argv[0], run_name="__main__")
