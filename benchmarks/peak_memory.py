"""Run a command and write its peak memory: python benchmarks/peak_memory.py FILE COMMAND [arguments].

FILE gets the largest resident set, in bytes, of the command's process or of any process below it. The system counts a
process's parent in until it is loaded, so that a program as large as ours cannot ask for itself; this one is small.
Exits as the command does.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    path, *command = sys.argv[1:]
    _, status, used = os.wait4(os.posix_spawnp(command[0], command, os.environ), 0)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    Path(path).write_text(str(used.ru_maxrss * unit))
    code = os.waitstatus_to_exitcode(status)
    sys.exit(code if code >= 0 else 128 - code)
