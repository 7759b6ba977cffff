"""A server on this machine that speaks /v1/models and /v1/completions with `echo` and `logprobs`, over a tiny model."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from sar_kd.tokenization.token_table import build_token_table


def log_probs_of(model, ids):
    """float64 [tokens - 1, V]: of each token after the first."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def prompt_logprobs(model, tokenizer, ids, k):
    """vLLM's form: a list with null, then {id: {logprob, rank, decoded_token}}, the text's own token first."""
    entries = [None]
    for log_probs, token in zip(log_probs_of(model, ids), ids[1:], strict=True):
        order = log_probs.argsort(descending=True).tolist()
        found = dict.fromkeys([token, *order[:k]])
        entries.append({
            str(i): {"logprob": float(log_probs[i]), "rank": order.index(i) + 1, "decoded_token": tokenizer.decode([i])}
            for i in found
        })  # fmt: skip
    return entries


class LogprobServer:
    """Answers from a model; the attributes change how, also while it runs."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.name = model, tokenizer, "tiny"
        self.takes_ids, self.no_ids, self.names_ids = True, 422, True
        self.names_bytes = True
        """A token that is no text is named by its bytes, as OpenAI's are; else as its decoding, which others share"""
        self.adds_start = self.hides_start = self.is_shifted = False
        self.most, self.gives, self.delay, self.max_model_len, self.redirect = 20, 20, 0.0, None, ""
        self.faults, self.requests, self.keys = [], [], []
        """faults: for each next request a status, or a function of the answer; requests: the bodies that came"""
        self._pieces = build_token_table(tokenizer, len(tokenizer)).pieces
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, body):
        prompts = body["prompt"]
        if isinstance(prompts, str):
            prompts = [self.tokenizer(prompts, add_special_tokens=False).input_ids]
        elif not self.takes_ids:
            return self.no_ids, {"detail": [{"msg": "Input should be a valid string"}]}
        if body["logprobs"] > self.most:
            return 400, {"error": {"message": f"logprobs must be at most {self.most}"}}
        by_id = self.names_ids and body.get("return_tokens_as_token_ids", False)
        choices = [{"index": i, **self._choice(ids, body, by_id)} for i, ids in enumerate(prompts)]
        usage = {"prompt_tokens": sum(map(len, prompts)) + len(prompts) * self.adds_start, "completion_tokens": 1}
        return 200, {"model": self.name, "choices": choices[::-1], "usage": usage}

    def _choice(self, ids, body, by_id):
        name = (lambda i: f"token_id:{i}") if by_id else self._name_of
        ids = [self.tokenizer.bos_token_id] * self.adds_start + list(ids)
        ids = [*ids, int(log_probs_of(self.model, [*ids, 0])[-1].argmax())]
        tops, own = [None], [None]
        for j, row in enumerate(log_probs_of(self.model, ids)):
            token = ids[j + 1 - self.is_shifted]
            likely = row.topk(min(body["logprobs"], self.gives)).indices.tolist()
            tops.append({name(i): float(row[i]) for i in [*likely, token]})
            own.append(float(row[token]))
        if self.is_shifted:  # each row at the token before
            tops, own = [None, *tops[2:], tops[-1]], [None, *own[2:], own[-1]]
        if self.hides_start and ids[0] == self.tokenizer.bos_token_id:
            ids, tops, own = ids[1:], [None, *tops[2:]], [None, *own[2:]]
        tokens = [name(i) for i in ids]
        return {"text": "", "logprobs": {"tokens": tokens, "token_logprobs": own, "top_logprobs": tops}}

    def _name_of(self, index):
        piece = self._pieces[index]
        try:
            return piece.decode() or self.tokenizer.decode([index])
        except UnicodeDecodeError:
            return (
                "".join(["bytes:", *(f"\\x{b:02x}" for b in piece)])
                if self.names_bytes
                else piece.decode(errors="replace")
            )


class _Handler(BaseHTTPRequestHandler):
    owner: LogprobServer

    def do_GET(self):
        if self.owner.redirect:
            self.send_response(307)
            self.send_header("Location", self.owner.redirect + "/models")
            self.end_headers()
            return
        model = {"id": self.owner.name, "max_model_len": self.owner.max_model_len}
        self._send(200, {"object": "list", "data": [model]})

    def do_POST(self):
        owner, body = self.owner, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        owner.requests.append(body)
        owner.keys.append(self.headers.get("Authorization"))
        time.sleep(owner.delay)
        fault = owner.faults.pop(0) if owner.faults else None
        if isinstance(fault, int):
            self._send(fault, {"error": {"message": "busy"}})
            return
        status, content = owner.answer(body)
        content = content if fault is None else fault(content)
        if content is None:  # the connection is lost
            self.close_connection = True
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the other side gave up
            self._send(status, content)

    def _send(self, status, content):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass
