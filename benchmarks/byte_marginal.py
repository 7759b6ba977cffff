"""How far the target inside a teacher's token is from the teacher's exact marginal over all tokenizations of the bytes.

    python benchmarks/byte_marginal.py                                               # the embedded pair
    python benchmarks/byte_marginal.py --teacher_model DIR --student_model DIR --positions 30

The exact marginal: dynamic programming over the bytes of the last tokens. Every tokenization of them is a context of
its own, on which the teacher is run, down to `--least` of the likeliest. The targets: from the token at the position
alone; with the token before it going on over the same bytes, as in training; and with two tokens before it. Total
variation over the same classes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sar_kd import embedded  # noqa: E402
from sar_kd.alignment.batch_alignment import TEACHER  # noqa: E402
from sar_kd.data.dataset import build_dataset  # noqa: E402
from sar_kd.data.files.samples import Document  # noqa: E402
from sar_kd.tokenization.tokenizer_pair import TokenizerPair  # noqa: E402

CONTEXT, MOST_BEFORE = 96, 3
"""Teacher tokens read before the first that is split in all ways; tokens before the position that are."""


class Marginal:
    """A teacher's distributions after bytes that it may have split in several ways."""

    def __init__(self, model, aligner, least: float):
        self.model, self.maps, self.least = model, aligner._maps[TEACHER], least
        self.pieces = aligner.pair.token_tables[TEACHER].pieces
        self.order = [v for v, piece in enumerate(self.pieces) if piece]

    def log_probs(self, contexts: list[list[int]]) -> torch.Tensor:
        """The next token's, float64 [n, V], of contexts of any lengths."""
        width = max(map(len, contexts))
        ids = torch.tensor([context + [0] * (width - len(context)) for context in contexts])
        with torch.no_grad():
            logits = self.model(input_ids=ids).logits
        return torch.stack([z[len(c) - 1] for z, c in zip(logits, contexts, strict=True)]).double().log_softmax(-1)

    def classes(self, table, rest: bytes) -> dict[int, int]:
        """The class of each token that spells `rest` or extends it."""
        class_of = dict(zip(table.fine_tokens.tolist(), table.fine_classes.tolist(), strict=True))
        tokens, following = self.maps.continuations(rest)
        end = table.num_classes - 1
        return {v: class_of.get(f, end) for v, f in zip(tokens.tolist(), following.tolist(), strict=True)}

    def exact(self, context: list[int], text: bytes, table) -> tuple[np.ndarray, int]:
        """Probabilities of the classes after `text`, and the number of contexts on which the teacher was run."""
        weights, nodes, num_run = np.zeros(table.num_classes), [(0.0, 0, context)], 0
        while nodes:
            batch, nodes = nodes, []
            for (weight, at, tokens), log_probs in zip(batch, self.log_probs([n[2] for n in batch]), strict=True):
                rest = text[at:]
                for token, class_ in self.classes(table, rest).items():
                    weights[class_] += np.exp(weight + log_probs[token].item())
                shorter = [v for v in self.order if len(self.pieces[v]) < len(rest) and rest.startswith(self.pieces[v])]
                for token in shorter:
                    child = weight + log_probs[token].item()
                    nodes.append((child, at + len(self.pieces[token]), [*tokens, token]))
            num_run += len(batch)
            best = max([float(weights.sum()), *(np.exp(node[0]) for node in nodes)])
            nodes = [node for node in nodes if np.exp(node[0]) > best * self.least]
        return weights / weights.sum(), num_run

    def target(self, rows: list[torch.Tensor], tokens: list[int], prefix: bytes, table, num_before: int) -> np.ndarray:
        """Probabilities of the classes where `num_before` tokens before the last may go on over what follows them.

        rows: the log-probabilities before each of `tokens`, and before the token that holds `prefix`
        """
        weights = np.zeros(table.num_classes)
        for back in range(min(num_before, len(tokens)) + 1):
            if back:
                prefix = self.pieces[tokens[-back]] + prefix
            for token, class_ in self.classes(table, prefix).items():
                # Relative to the path on which all of them ended as in the text.
                later = sum(rows[-i - 1][tokens[-i]].item() for i in range(1, back + 1))
                weights[class_] += np.exp(rows[-back - 1][token].item() - later)
        return weights / weights.sum()


def measure(options) -> dict[str, list[float]]:
    names = options.student_model or embedded.STUDENT_DIR, options.teacher_model or embedded.TEACHER_DIR
    tokenizers = [transformers.AutoTokenizer.from_pretrained(name) for name in names]
    sizes = [transformers.AutoConfig.from_pretrained(name).get_text_config().vocab_size for name in names]
    model = transformers.AutoModelForCausalLM.from_pretrained(names[1], dtype=torch.float32).eval()
    texts = [Path(file).read_text() for file in options.train_file] or list(embedded.read_text("transfer")[0].values())
    pair = TokenizerPair(*tokenizers, student_vocab_size=sizes[0], teacher_vocab_size=sizes[1])
    dataset = build_dataset([Document(str(i), text) for i, text in enumerate(texts)], pair, 256, 1024)
    marginal, draw = Marginal(model, dataset.aligner, options.least), np.random.default_rng(0)
    found: dict[str, list[float]] = {"one": [], "two": [], "three": [], "contexts": []}
    blocks = draw.permutation(len(dataset))
    for block in blocks.tolist():
        batch = dataset.batch([block])
        record, ids = batch.alignment.teacher_continuations, batch.teacher.input_ids[0].tolist()
        places = draw.permutation(record.num_inside)[: options.per_block].tolist()
        for i in places:
            position = int(record.continuing_positions[i])
            first = max(0, position - MOST_BEFORE)
            tokens = ids[first + 1 : position + 1]
            if position < 8 or not all(marginal.pieces[v] for v in tokens):
                continue
            streams, parts = (dataset.text.student, dataset.text.teacher), dataset.blocks[block]
            starting = int(batch.student.positions[record.starting_positions[i]])
            length = _start(streams[0], parts.student_start + starting)
            length -= _start(streams[1], parts.teacher_start + position)
            prefix = marginal.pieces[ids[position + 1]][:length]
            table = dataset.aligner._maps[TEACHER].after_prefix(prefix)
            context = ids[max(0, first + 1 - CONTEXT) : first + 1]
            rows = list(marginal.log_probs([context + tokens[:k] for k in range(len(tokens) + 1)]))
            text = b"".join(marginal.pieces[v] for v in tokens) + prefix
            exact, num_run = marginal.exact(context, text, table)
            for num_before, name in enumerate(("one", "two", "three")):
                target = marginal.target(rows, tokens, prefix, table, num_before)
                found[name].append(0.5 * float(np.abs(target - exact).sum()))
            found["contexts"].append(num_run)
            if len(found["one"]) >= options.positions:
                return found
    return found


def _start(stream, index: int) -> int:
    """The byte at which a token of a stream starts."""
    return int(stream.ends[index - 1]) if index else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher_model")
    parser.add_argument("--student_model")
    parser.add_argument("--train_file", nargs="*", default=[])
    parser.add_argument("--positions", type=int, default=100)
    parser.add_argument("--per_block", type=int, default=4)
    parser.add_argument("--least", type=float, default=1e-4, help="weight of a context beside the likeliest")
    found = measure(parser.parse_args())
    for name in ("one", "two", "three"):
        tv = np.array(found[name])
        print(json.dumps({
            "paths": name, "positions": len(tv), "mean": round(float(tv.mean()), 4),
            "p90": round(float(np.quantile(tv, 0.9)), 4), "max": round(float(tv.max()), 4),
        }))  # fmt: skip
    reached = int(np.sum(np.abs(np.array(found["one"]) - np.array(found["two"])) > 1e-6))
    print(json.dumps({"changed_by_the_token_before": reached, "contexts_run": int(sum(found["contexts"]))}))


if __name__ == "__main__":
    main()
