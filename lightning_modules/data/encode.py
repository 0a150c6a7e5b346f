"""Rows to tokens: plain text is learned whole, of instructions and chats only the answers."""

from typing import Any, NamedTuple

from lightning_modules.data.rows import Row
from qat.errors import InputError


class Encoded(NamedTuple):
    """Token ids of one document, and for each whether its prediction counts in the loss."""

    ids: list[int]
    learned: list[bool]


def encode_row(row: Row, tokenizer: Any) -> Encoded:
    """Tokenize one row, which holds `text`, or `instruction` and `response`, or `messages`.

    Instructions and messages go through the tokenizer's chat template, if it has one.

    Raises:
        InputError: if the row has none of these columns.
    """
    if isinstance(row.get("text"), str):
        return _whole(row["text"], tokenizer)
    messages = _messages(row)
    ids: list[int] = []
    learned: list[bool] = []
    for end, message in enumerate(messages, 1):
        upto = _chat_ids(messages[:end], tokenizer)
        if message["role"] == "assistant":
            prompt = _chat_ids(messages[: end - 1], tokenizer, prompt=True)
            learned += [False] * (len(prompt) - len(ids))
            ids = prompt
        learned += [message["role"] == "assistant"] * (len(upto) - len(ids))
        ids = upto
    return Encoded(ids, learned)


def _whole(text: str, tokenizer: Any) -> Encoded:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return Encoded(ids, [True] * len(ids))


def _messages(row: Row) -> list[dict[str, str]]:
    if isinstance(row.get("messages"), list):
        return row["messages"]
    if "instruction" in row and "response" in row:
        question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": row["response"]}]
    raise InputError(
        f"A row has the columns {', '.join(sorted(row)) or 'none'}; expected 'text', 'instruction' and 'response', or "
        "'messages' (a list of role and content)."
    )


def _chat_ids(messages: list[dict[str, str]], tokenizer: Any, prompt: bool = False) -> list[int]:
    if not messages:
        return []
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    else:
        end = tokenizer.eos_token or ""
        text = "".join(f"{m['content']}{end if m['role'] == 'assistant' else chr(10)}" for m in messages)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
