"""Which symbols a library wants from Python or from torch's C++: none, or it would be tied to one version of them.

python tests/symbols.py LIBRARY… prints them and exits with 1 where there are any.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

PYTHON = re.compile(r"_?Py[A-Z_]")
TORCH_CPP = re.compile(r"(?<![\w:])(c10|at|caffe2|torch)::")


def undefined(library: Path) -> list[str]:
    """The symbols that `library` wants from others, demangled."""
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split(maxsplit=1)[1] for line in lines if line.strip()]


def foreign(symbols: Iterable[str]) -> list[str]:
    """Those of `symbols` that are Python's, or torch's outside its stable C interface."""
    return [symbol for symbol in symbols if PYTHON.match(symbol) or TORCH_CPP.search(symbol)]


def needed(library: Path) -> list[str]:
    """The libraries that `library` names as needed."""
    text = subprocess.run(["readelf", "--dynamic", str(library)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", text)


if __name__ == "__main__":
    found = [f"{path}: {symbol}" for path in sys.argv[1:] for symbol in foreign(undefined(Path(path)))]
    print("\n".join(found))
    sys.exit(1 if found else 0)
