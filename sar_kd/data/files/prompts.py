"""Prompts for a teacher, from the files that hold training text: a conversation without its last answer, or a document.

A row needs no answer, and one that is there is left out. In its place stands `ANSWER`, so that every check and form of
`samples` holds for prompts too, and a chat template can show where an answer begins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from sar_kd.data.files import public_forms
from sar_kd.data.files.samples import PAIRS, Conversation, Document, Sample, read_file, sample_of
from sar_kd.errors import UsageError
from sar_kd.runtime.console import count_of

ANSWER = "-"
"""What stands for the answer to be written"""


def read_prompts(paths: tuple[str, ...], text_field: str, show: Callable[[str], object]) -> list[Sample]:
    """The prompts of `--prompts`, in order.

    show: takes a line about examples that are empty
    Raises: UsageError for a file that is missing, unreadable or of another kind, or where there is no prompt
    """
    found = [sample for path in paths for sample in read_file("prompts", Path(path), text_field, _prompt_of)]
    prompts = [sample for sample in found if not (isinstance(sample, Document) and not sample.text.strip())]
    if not prompts:
        raise UsageError(f"--prompts {' '.join(paths)}: holds no prompt")
    if num_empty := len(found) - len(prompts):
        show(f"Skipped {count_of(num_empty, 'empty example')}")
    return prompts


def row_of(prompt: Sample, beginning: str, answer: str) -> dict:
    """The example of a `--train_file` in which a prompt has this answer; only that is learned, or a text as a whole.

    beginning: what an answer or a text begins with before what was written
    """
    if not isinstance(prompt, Conversation):
        return {"text": beginning + answer}
    answer = beginning + answer
    turns = list(_turns(prompt))
    tools = {"tools": json.loads(prompt.tools)} if prompt.tools else {}
    if prompt.plain:
        return {"prompt": prompt.messages[0].content, "completion": answer, **tools}
    written = {"role": "assistant", "content": answer}
    if any(turn["role"] == "assistant" for turn in turns):  # in `messages` these would be learned too
        return {"prompt": turns, "completion": [written], **tools}
    return {"messages": [*turns, written], **tools}


def _turns(prompt: Conversation) -> Iterator[dict]:
    for message in prompt.messages[:-1]:
        fields = json.loads(message.fields) if message.fields else {}
        yield {"role": message.role, "content": message.content, **fields}


def _prompt_of(name: str, example: object, text_field: str, where: str) -> Document | Conversation:
    """As `sample_of`, with `ANSWER` as the last answer, the only target."""
    if isinstance(example, dict) and not isinstance(example.get(text_field), str):
        example = _with_answer(example)
    sample = sample_of(name, example, text_field, where)
    if isinstance(sample, Document) or sample.fault:
        return sample
    *asked, answer = sample.messages
    if not any(message.content.strip() or message.fields for message in asked):
        return Conversation(name, (), plain=False, fault="it has no prompt")
    return sample._replace(messages=(*(message._replace(is_target=False) for message in asked), answer))


def _with_answer(example: dict) -> dict:
    """The example as a conversation that ends with `ANSWER`; as it is if it is none."""
    turns = example.get("messages")
    if "messages" not in example:
        if pair := next((pair for pair in PAIRS if pair[0] in example), None):
            return {pair[0]: example[pair[0]], pair[1]: ANSWER, "tools": example.get("tools")}
        found = public_forms.as_messages({**example, "output": ANSWER} if "instruction" in example else example)
        if found is None:
            return example
        turns = found[1]
    if isinstance(turns, list):
        count = len(turns)
        while count and isinstance(turns[count - 1], dict) and turns[count - 1].get("role") == "assistant":
            count -= 1
        turns = [*turns[:count], {"role": "assistant", "content": ANSWER}]
    return {"messages": turns, "tools": example.get("tools")}
