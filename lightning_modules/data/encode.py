"""Rows to tokens: plain text is learned whole, of instructions and chats only the answers."""

from typing import Any, NamedTuple

from jinja2 import TemplateError

from lightning_modules.data.rows import Row
from qat.errors import InputError

_REWRITTEN = (
    "The chat template renders earlier turns differently once later ones follow, so answers cannot be found in the "
    "whole. Split such chats into rows that end with their first answer."
)


class Encoded(NamedTuple):
    """Token ids of one document, and for each whether its prediction counts in the loss."""

    ids: list[int]
    learned: list[bool]


def encode_row(row: Row, tokenizer: Any) -> Encoded:
    """Tokenize one row, which holds `text`, or `instruction` and `response`, or `messages`.

    Instructions and messages go through the tokenizer's chat template, if it has one.

    Raises:
        InputError: if the row has none of these columns, or its messages do not fit the tokenizer's chat template.
    """
    if isinstance(row.get("text"), str):
        return _whole(row["text"], tokenizer)
    return _chat(_messages(row), tokenizer)


def _whole(text: str, tokenizer: Any) -> Encoded:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return Encoded(ids, [True] * len(ids))


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> Encoded:
    """The whole conversation, of which what follows each prompt for the assistant is learned.

    Prompts and answers are tokenized apart, as they are when a model answers.
    """
    ids: list[int] = []
    learned: list[bool] = []

    def add(text: str, learn: bool) -> None:
        own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids.extend(own)
        learned.extend([learn] * len(own))

    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:turn], tokenizer, prompt=True)
        answered = _render(messages[: turn + 1], tokenizer)
        if not (prompt.startswith(done) and answered.startswith(prompt)):
            raise InputError(_REWRITTEN)
        add(prompt.removeprefix(done), learn=False)
        add(answered.removeprefix(prompt), learn=True)
        done = answered
    whole = _render(messages, tokenizer)
    if not whole.startswith(done):
        raise InputError(_REWRITTEN)
    add(whole.removeprefix(done), learn=False)
    return Encoded(ids, learned)


def _messages(row: Row) -> list[dict[str, str]]:
    if "messages" in row:
        return _checked(row["messages"])
    if "instruction" in row and "response" in row:
        question = "\n\n".join(str(part) for part in (row["instruction"], row.get("input")) if part)
        return _checked([{"role": "user", "content": question}, {"role": "assistant", "content": row["response"]}])
    raise InputError(
        f"A row has the columns {', '.join(sorted(row)) or 'none'}; expected 'text', 'instruction' and 'response', or "
        "'messages' (a list of role and content)."
    )


def _checked(messages: Any) -> list[dict[str, str]]:
    for message in messages if isinstance(messages, list) and messages else [None]:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(
                f"A chat holds {str(message)[:60]!r} where a message belongs: give each one a 'role' and a 'content', "
                "both text."
            )
    return list(messages)


def _render(messages: list[dict[str, str]], tokenizer: Any, prompt: bool = False) -> str:
    if not messages:
        raise InputError("A chat starts with the assistant: give it a user's or system message to answer first.")
    if not tokenizer.chat_template:
        end = tokenizer.eos_token or ""
        return "".join(f"{m['content']}{end if m['role'] == 'assistant' else chr(10)}" for m in messages)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        raise InputError(f"The tokenizer's chat template refuses a chat: {error}.") from error
