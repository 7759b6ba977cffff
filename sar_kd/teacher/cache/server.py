"""A client of an OpenAI-compatible server: one request at a time, again after an error that may pass.

A key goes into the header of a request and nowhere else; redirects are not followed, because they would take it along.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from sar_kd.config.caching import API_KEY, ElsewhereConfig
from sar_kd.errors import UsageError

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before each further attempt"""

_PASSING = {408, 409, 425, 429}
"""Statuses behind which another attempt may succeed, beside those from 500 on"""


class Refused(Exception):
    """The server refuses a request for what is in it."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args, **kwargs):
        """None: another address would get the key."""


class Client:
    """Sends requests, again after an error that may pass, and counts connections that were lost."""

    def __init__(self, config: ElsewhereConfig, show: Callable[[str], object]):
        self.url, self._timeout, self._show = config.teacher_url.rstrip("/"), config.server_timeout, show
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._has_answered = False
        self.num_lost = 0
        """Connections that were lost, after which another model may answer"""

    def error(self, reason: str) -> UsageError:
        """An error about the server, in one line."""
        return UsageError(f"--teacher_url {self.url}: {reason}")

    def request(self, path: str, body: dict | None = None, is_trial: bool = False) -> dict:
        """The object with which the server answers. body: to be posted; is_trial: status 500 refuses it, too

        Raises: Refused with the server's words; UsageError if there is no answer after all attempts, or one that is no
            JSON object
        """
        for wait in (*WAITS, None):
            try:
                answer = json.loads(self._open(path, body))
                self._has_answered = True
                if not isinstance(answer, dict):
                    raise ValueError
                return answer
            except (ValueError, RecursionError):
                raise self.error(
                    f"its answer to {path} is no JSON object; is it an OpenAI-compatible server?"
                ) from None
            except urllib.error.HTTPError as error:
                reason, self._has_answered = f"{error.code} {_words_of(error)}", True
                if error.code in (401, 403):
                    raise self.error(f"wants a key ({reason}); give it in {API_KEY}") from None
                if (error.code < 500 and error.code not in _PASSING) or (error.code == 500 and is_trial):
                    raise Refused(reason) from None
            except (OSError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", error)
                reason = "no answer in time" if isinstance(cause, TimeoutError) else f"no answer ({_in_line(cause)})"
                if isinstance(cause, ssl.SSLError) or not self._has_answered:
                    raise self.error(f"{reason}; is the server started, and this its address?") from None
                self.num_lost += 1
            if wait is None:
                break
            self._show(f"The teacher's server: {reason}; trying again in {wait:g} s")
            time.sleep(wait)
        raise self.error(f"{reason}, in {len(WAITS) + 1} attempts; the same command goes on after the last shard")

    def _open(self, path: str, body: dict | None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        with self._opener.open(request, timeout=self._timeout) as answer:
            return answer.read()


def _words_of(error: urllib.error.HTTPError) -> str:
    """What the server says, in a line."""
    try:
        text = error.read(2000).decode("utf-8", "replace")
        found = json.loads(text)
        found = found.get("error", found)
        text = found.get("message") or found.get("detail") or text if isinstance(found, dict) else str(found)
    except (OSError, ValueError, AttributeError, http.client.HTTPException):
        text = error.reason
    return _in_line(text)


def _in_line(text: Any) -> str:
    line = " ".join(str(text).split())
    key = os.environ.get(API_KEY)  # some servers repeat it
    return (line.replace(key, "***") if key else line)[:300]
