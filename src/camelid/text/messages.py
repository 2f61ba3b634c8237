"""Messages of chat and instruction examples, in the formats of ShareGPT, OpenAI and Alpaca.

Nothing in a message is ignored silently. A key of a message is its role, its content, a flag that decides whether it is
trained on, or metadata (`LABELS`); any other key with a value is an error. Of the other keys of an example, those that
other systems treat as a part of the chat or of its loss are read or refused; all others are metadata.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from camelid.errors import UserError

if TYPE_CHECKING:
    from camelid.text.chat import ChatTemplate

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
SWITCHES = ("train", "training", "trainable", "loss", "loss_mask")
"""Keys of a message that decide whether it is trained on: of axolotl (train, training), ms-swift (loss) and others."""
LABELS = frozenset(
    """
    id uuid message_id parent_id conversation_id turn turn_id index idx timestamp create_time created_at updated_at date
    lang language model model_name source origin metadata meta hash num_tokens token_count
    """.split()
)
"""Metadata of a message, which no template uses."""
SYSTEM = ("system", "system_prompt", "system_message")
"""Keys of an example that contain the system message."""
NOT_A_CHAT = ("tools", "functions", "documents", "history", "images", "videos", "audios")
"""Keys of an example that belong to the chat and are not supported."""
OF_ROWS = (*SWITCHES, "weight", "mask", "train_on_input", "train_on_inputs")
"""Keys that would change the loss of an entire example; messages have flags for that."""

MOST_WEIGHT = float(np.finfo(np.float32).max)
MEND = "Remove the row, or correct it."


@dataclass(frozen=True)
class Message:
    role: str
    """system, user or assistant."""
    content: str
    weight: float | None = None
    """Loss weight of its tokens; None: determined by the role and the `loss` setting."""


def read_chat(row: Mapping[str, Any]) -> list[Message]:
    """The messages of a ShareGPT row {conversations: [{from, value}]}, or of {messages: [{role, content}]}.

    Raises UserError that names the message and the key if something is missing, empty, or unknown. The order of roles
    is not checked here: templates do that.
    """
    # In tables, every row has every column.
    present = [key for key in ("messages", "conversations") if row.get(key) is not None]
    if len(present) == 2:
        raise UserError("the row has messages and conversations", "Keep one of the two.")
    key = present[0] if present else next((key for key in ("messages", "conversations") if key in row), None)
    if key is None:
        raise UserError(
            f"no field 'messages' or 'conversations', only {', '.join(map(repr, map(str, row))) or 'none'}",
            "Give each chat its messages in one of these fields, or set kind to that of the records.",
        )
    rows = row[key]
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{key} is {_shown(rows)}, not a list of messages", MEND)
    read = [_read_message(f"{key}[{index}]", message) for index, message in enumerate(rows)]
    messages = [message for message in read if message is not None]
    if not messages:
        raise UserError(f"{key} contains only empty system messages", MEND)
    return _with_system(row, messages)


def read_instruct(row: Mapping[str, Any], template: "ChatTemplate") -> list[Message]:
    """The messages of a row {instruction, input, output}; the template defines how the first two are joined."""
    instruction, output = (_text(key, row.get(key)) for key in ("instruction", "output"))
    given = row.get("input")
    messages = [Message("user", instruction), Message("assistant", output)]
    if given is not None and (not isinstance(given, str) or given.strip()):
        messages[0] = Message("user", instruction + template.input_joint + _text("input", given))
        if template.input_system is not None and not any(_holds(row.get(key)) for key in SYSTEM):
            messages.insert(0, Message("system", template.input_system))
    return _with_system(row, messages)


def _read_message(place: str, row: Any) -> Message | None:
    """A message; None if it is an empty system message."""
    if not isinstance(row, Mapping):
        raise UserError(f"{place} is {_shown(row)}, not a message", "Write it as {role, content} or {from, value}.")
    shares = any(row.get(key) is not None for key in ("from", "value"))
    keys = ("from", "value") if shares else ("role", "content")
    role_key, content_key = keys
    _refuse_unknown(place, row, keys)
    if role_key not in row:
        raise UserError(f"{place} has no {role_key!r}", f"Its keys are {', '.join(map(str, row)) or '(none)'}")
    role = ROLES.get(row[role_key]) if isinstance(row[role_key], str) else None
    if role is None:
        raise UserError(f"{place}.{role_key} is {_shown(row[role_key])}", f"The roles are {', '.join(ROLES)}.")
    content = row.get(content_key)
    if role == "system" and not _holds(content):
        return None
    return Message(role, _text(f"{place}.{content_key}", content), _weight(place, row))


def _refuse_unknown(place: str, row: Mapping[str, Any], keys: Iterable[str]) -> None:
    known = (*keys, "weight", *SWITCHES)
    for key, value in row.items():
        # False is not ignored: it may belong to an unknown flag.
        if key not in known and key not in LABELS and value is not None and value not in ("", [], {}):
            raise UserError(
                f"{place} has {key} = {_shown(value)}, which is neither its text nor a known flag",
                f"Remove such rows, or remove the key from the messages if it does not matter. The flags are weight, "
                f"{', '.join(SWITCHES)}.",
            )


def _holds(content: Any) -> bool:
    """Whether a content is more than null, white space, or an empty list."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return any(_holds(part.get("text")) for part in content)
    return bool(content.strip()) if isinstance(content, str) else content is not None


def _text(place: str, content: Any) -> str:
    """A text, given as a string or as OpenAI's list of parts."""
    if isinstance(content, list) and content:
        for index, part in enumerate(content):
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise UserError(f"{place}[{index}] is {_shown(part)}", 'Only parts {type: "text", text} are supported.')
        content = "".join(part["text"] for part in content)
    if content is None:
        raise UserError(f"{place} is missing", MEND)
    if not isinstance(content, str):
        raise UserError(f"{place} is {_shown(content)}, not a text", MEND)
    if not content.strip():
        raise UserError(f"{place} is empty", MEND)
    return content


def _weight(place: str, row: Mapping[str, Any]) -> float | None:
    """The loss weight of a message from its weight or flags; None if it has neither."""
    given = {key: row[key] for key in ("weight", *SWITCHES) if row.get(key) is not None}
    for key, value in given.items():
        number = isinstance(value, int | float) and not (isinstance(value, bool) and key == "weight")
        if key == "weight" and not (number and 0 <= value <= MOST_WEIGHT):
            raise UserError(
                f"{place}.weight is {_shown(value)}", "A weight is a number of 0 or more within the range of float32."
            )
        if key != "weight" and not (number and value in (0, 1)):
            raise UserError(f"{place}.{key} is {_shown(value)}", "Write true or false, or use weight for a number.")
    weights = {float(value) for value in given.values()}
    if len(weights) > 1:
        shown = " and ".join(f"{key} = {_shown(value)}" for key, value in given.items())
        raise UserError(f"{place} has {shown}, which disagree", "Keep one of them.")
    return weights.pop() if weights else None


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages with the system message that some data sets have outside of the list."""
    for key in NOT_A_CHAT:
        if row.get(key):
            raise UserError(f"the row has {key}, which is not supported", "Remove such rows, or put it into messages.")
    for key in OF_ROWS:
        if (value := row.get(key)) is not None and value is not True and value != 1:
            raise UserError(
                f"the row has {key} = {_shown(value)}, which would change the loss of all its messages",
                "Give each message its own weight or train flag, or rename the key if it means something else.",
            )
    given = {key: row[key] for key in SYSTEM if _holds(row.get(key))}
    if not given:
        return messages
    texts = {_text(key, value) for key, value in given.items()}
    if len(texts) > 1:
        raise UserError(f"the row has {' and '.join(given)}, which differ", "Keep one of them.")
    text = texts.pop()
    if messages[0].role == "system":
        if messages[0].content == text:
            return messages
        raise UserError(f"the row has {next(iter(given))}, and a system message too", "Keep one of the two.")
    return [Message("system", text), *messages]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
