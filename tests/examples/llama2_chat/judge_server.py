"""A judge that speaks OpenAI's chat completions protocol and knows nothing: for tests and for a check offline.

    python tests/examples/llama2_chat/judge_server.py --port 8000

It rates by the length of what it is shown.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def rate_by_length(request: dict[str, Any]) -> str:
    """A grade that depends on the prompt alone."""
    return f"It has a length.\nRating: [[{len(request['messages'][1]['content']) % 10 + 1}]]"


class JudgeServer(ThreadingHTTPServer):
    """Answers with `reply` of the request: a judgment, an HTTP status to fail with, or bytes to send as they are.

    Attributes:
        requests: The bodies received, in order.
        keys: The authorisation sent with each.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], str | int | bytes] = rate_by_length, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.keys.append(self.headers["Authorization"])
        if self.path != "/v1/chat/completions":
            return self.send(404, b"{}")
        reply = self.server.reply(request)
        if isinstance(reply, bytes):
            return self.send(200, reply)
        if isinstance(reply, int):
            return self.send(reply, b'{"error": {"message": "try later"}}')
        return self.send(200, json.dumps(completion(request["model"], reply)).encode())

    def send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "5")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def completion(model: str, text: str) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return {
        "id": "0", "object": "chat.completion", "created": int(time.time()), "model": model, "choices": [choice],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000, help="where it listens on this machine (%(default)s)")
    JudgeServer(port=parser.parse_args().port).serve_forever()
