"""Prints the newest Python on this machine that is newer than the one that runs this.

The arguments are versions to look for, such as 3.13.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def pythons(version: str) -> Iterator[str]:
    """Where a version may be: on the path, and among those of pyenv."""
    if found := shutil.which(f"python{version}"):
        yield found
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted((root / "versions").glob(f"{version}.*/bin/python{version}")))


def runs(python: str) -> bool:
    """Whether it starts, which a shim need not, and can make environments."""
    command = [python, "-c", "import ensurepip, venv"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> None:
    versions = sorted((tuple(map(int, v.split("."))) for v in sys.argv[1:]), reverse=True)
    for major, minor in versions:
        if (major, minor) > sys.version_info[:2]:
            for python in pythons(f"{major}.{minor}"):
                if runs(python):
                    print(python)
                    return


if __name__ == "__main__":
    main()
