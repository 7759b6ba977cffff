"""What the processes of a run tell each other at their end, so that the user reads one line, and the right one.

Where one process fails, the others fail a moment later in a collective that it is missing from, and torchrun ends
whatever is left. So each says at its end why it ends, where the others can read it, and waits for them a moment.
"""

from __future__ import annotations

import json
import signal
import time

import torch.distributed as dist

_SECONDS = 5.0


class Farewell:
    """The last words of one of `size` processes. store: outlives the process (torchrun's own does)."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.rank, self.size, self._store = rank, size, dist.PrefixStore("farewell", store)
        self._awaited = set(range(size))

    def is_to_say(self, line: str, follows: bool = False) -> bool:
        """The lowest of the ranks that end with the same line; of lines with a reason elsewhere only if there is none.

        Waits for the others, but not long: torchrun ends them all as soon as one has ended.
        """
        said = self._exchange("end", [line, follows])
        self._exchange("left", None, seconds=0.0 if self.rank else _SECONDS)  # rank 0 may be keeping the store
        reasons = {rank: text for rank, (text, follows) in said.items() if not follows}
        lines = reasons or {rank: text for rank, (text, _) in said.items()}
        return self.rank == min((rank for rank, text in lines.items() if text == line), default=None)

    def lost(self, error: RuntimeError) -> str | None:
        """The line about a collective that failed because another process is gone; None if it is another error."""
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            return None
        silent = sorted(set(range(self.size)) - self._exchange("end", ["", True]).keys())
        self._awaited -= set(silent)
        if not silent:
            return f"the processes of the run lost each other ({str(error).splitlines()[0]})"
        which = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
        return f"{which} of {self.size} ended without a word, or does not answer"

    def _exchange(self, what: str, own, seconds: float = _SECONDS) -> dict[int, list]:
        """Say something; what every rank has said, once all have or so many seconds have passed."""
        for number in (signal.SIGINT, signal.SIGTERM):  # torchrun's to the ranks that are left
            signal.signal(number, signal.SIG_IGN)
        keys = {rank: f"{what}/{rank}" for rank in self._awaited}
        try:
            self._store.set(f"{what}/{self.rank}", json.dumps(own))
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and not self._store.check(list(keys.values())):
                time.sleep(0.05)
            found = {rank: self._store.get(key) for rank, key in keys.items() if self._store.check([key])}
        except dist.DistError:  # the process that kept the store is gone
            return {self.rank: own}
        return {rank: json.loads(said) for rank, said in found.items()}
