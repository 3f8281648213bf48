"""A small server that speaks OpenAI's routes, around a real engine: for tests of what asks such servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from typing import Any

from weft.prompt.file import PromptSampling
from weft.prompt.local import LocalModel
from weft.prompt.model import Ask, Form
from weft.serve.request import Request, Sampling


class Handler(BaseHTTPRequestHandler):
    model: LocalModel
    lock: threading.Lock
    busy: list[int]  # status codes that the next requests get
    bodies: list[dict[str, Any]]
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None: ...

    def do_GET(self) -> None:
        self.tell({"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
        if self.busy:
            self.tell({"error": {"message": "come back"}}, self.busy.pop(), {"Retry-After": "0.05"})
            return
        with self.lock:
            try:
                self.answer(body)
            except ValueError as error:
                self.tell({"error": {"message": str(error)}}, 400)

    def answer(self, body: dict[str, Any]) -> None:
        if self.path == "/tokenize":
            self.tell({"tokens": self.model.encode(body["prompt"]), "max_model_len": self.model.engine.max_context})
        elif self.path == "/v1/embeddings":
            vectors = self.model.embed(body["input"]).tolist()
            self.tell({"data": [{"index": index, "embedding": one} for index, one in enumerate(vectors)][::-1]})
        elif body.get("echo"):
            self.tell({"choices": [{"index": 0, "text": "", "logprobs": self.echo(body["prompt"])}]})
        elif body.get("stream"):
            self.stream(body)
        else:
            [(_, reply)] = self.model.complete([self.asked(body)])
            chat = "messages" in body
            choices = [
                {"index": index, "finish_reason": "length"}
                | ({"message": {"content": text}} if chat else {"text": text})
                for index, text in enumerate(reply.texts)
            ]
            usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.new_tokens}
            self.tell({"choices": choices[::-1], "usage": usage})

    def asked(self, body: dict[str, Any]) -> Ask:
        settings = {name: body[name] for name in PromptSampling.model_fields if name in body}
        form = None
        if "structured_outputs" in body:
            form = Form("regex", body["structured_outputs"]["regex"])
        if "response_format" in body:
            form = Form("json_schema", json.dumps(body["response_format"]["json_schema"]["schema"]))
        prompt = body["prompt"] if "prompt" in body else tuple(body["messages"])
        return Ask(prompt, PromptSampling.model_validate(settings), body.get("n", 1), form)

    def echo(self, prompt: str | list[int]) -> dict[str, Any]:
        ids = self.model.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self.model.engine.add(Request("echo", ids, Sampling(max_tokens=1), prompt_logprobs=1, logprobs=1))
        found = []
        while self.model.engine.busy:
            for output in self.model.engine.step():
                found += [*(output.prompt_logprobs or ()), *(output.logprobs or ())]
        texts = [self.model.tokenizer.decode([one]) for one in ids]  # of a part of a character: no part of the text
        return {
            "token_logprobs": [one.logprob if one else None for one in found],
            "top_logprobs": [{"most": one.top[0][1]} if one else None for one in found],
            "text_offset": [0, *accumulate(map(len, texts))],
        }

    def stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for piece in self.model.stream(self.asked(body)):
            choice = {"delta": {"content": piece}} if "messages" in body else {"text": piece}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def tell(self, body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def served(model: LocalModel) -> Iterator[tuple[str, type[Handler]]]:
    """The server's URL, and its handler, which keeps the bodies that it got."""
    handler = type("Served", (Handler,), {"model": model, "lock": threading.Lock(), "busy": [], "bodies": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
