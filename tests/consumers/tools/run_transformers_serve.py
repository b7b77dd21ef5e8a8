"""`transformers serve`, asked for one answer."""

from __future__ import annotations

import sys
from pathlib import Path

from http_server import Server


def open_folder(folder: str, way: str) -> Server:
    command = [str(Path(sys.executable).with_name("transformers")), "serve"]
    flags = ["--dtype", "float32", "--device", "cpu", "--trust-remote-code"]
    return Server(command, flags, model=folder)
