"""Rows to tokens: plain text is learned whole, of instructions and chats only the answers."""

from typing import Any, NamedTuple

from jinja2 import TemplateError

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
    """The whole conversation, of which what follows each prompt for the assistant is learned."""
    rendered = _render(messages, tokenizer)
    answers: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = _render(messages[:turn], tokenizer, prompt=True)
            answered = _render(messages[: turn + 1], tokenizer)
            if not (answered.startswith(prompt) and rendered.startswith(answered)):
                raise InputError(
                    "The chat template renders earlier turns differently once later ones follow, so answers cannot be "
                    "found in the whole. Split such chats into rows that end with their first answer."
                )
            answers.append((len(prompt), len(answered)))
    encoded = tokenizer(rendered, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    learned = [any(first <= start < last for first, last in answers) for start in starts]
    return Encoded(list(encoded["input_ids"]), learned)


def _messages(row: Row) -> list[dict[str, str]]:
    if "messages" in row:
        return _checked(row["messages"])
    if "instruction" in row and "response" in row:
        question = "\n\n".join(str(part) for part in (row["instruction"], row.get("input")) if part)
        return _checked(
            [{"role": "user", "content": question}, {"role": "assistant", "content": row["response"]}],
        )
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
        return ""
    if not tokenizer.chat_template:
        end = tokenizer.eos_token or ""
        return "".join(f"{m['content']}{end if m['role'] == 'assistant' else chr(10)}" for m in messages)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        raise InputError(f"The tokenizer's chat template refuses a chat: {error}.") from error
