"""A server of the OpenAI protocol, asked over HTTP. Imports the standard library alone."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

from protocol import NEW_TOKENS

PATIENCE = 300  # seconds until it answers


class Server:
    """Starts `command --port N flags` and waits until it answers; `close` ends it."""

    def __init__(self, command: list[str], flags: list[str], model: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.model = f"http://127.0.0.1:{port}", model
        self.process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port), *flags])
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.process.returncode}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise TimeoutError("the server does not answer")

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return json.load(response)

    def completion(self, messages: list[dict[str, str]]) -> str:
        asked = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": NEW_TOKENS}
        return self._post("/v1/chat/completions", asked)["choices"][0]["message"]["content"]

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
