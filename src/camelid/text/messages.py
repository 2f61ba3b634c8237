"""Rows of chat data to messages: ShareGPT's, OpenAI's and Alpaca's.

Nothing in a message is dropped in silence. A key of a message is its role, its content, a flag that says whether it is
learnt, or a label that changes neither (`LABELS`); any other key that holds something is an error. A row may have keys
of its own beside its messages, as most data sets do: those that other systems take for a part of the chat or of its
loss are read or refused, all others describe the row.
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
"""Keys of a message that say whether it is learnt, as axolotl (train, training), ms-swift (loss) and others write."""
LABELS = frozenset(
    """
    id uuid message_id parent_id conversation_id turn turn_id index idx timestamp create_time created_at updated_at date
    lang language model model_name source origin metadata meta hash num_tokens token_count
    """.split()
)
"""Keys of a message that describe it, and that no template writes."""
SYSTEM = ("system", "system_prompt", "system_message")
"""Keys of a row that hold the message of the system."""
NOT_A_CHAT = ("tools", "functions", "documents", "history", "images", "videos", "audios")
"""Keys of a row that belong to its chat, and would be lost."""
OF_ROWS = (*SWITCHES, "weight", "mask", "train_on_input", "train_on_inputs")
"""Keys that would change the loss of a whole row; for that, messages have flags."""

MOST_WEIGHT = float(np.finfo(np.float32).max)
MEND = "leave the row out, or mend it"


@dataclass(frozen=True)
class Message:
    role: str
    """system, user or assistant"""
    content: str
    weight: float | None = None
    """how much its tokens count; left out, the role and the loss decide"""


def read_chat(row: Mapping[str, Any]) -> list[Message]:
    """The messages of a row: ShareGPT's {conversations: [{from, value}]}, or {messages: [{role, content}]}.

    Raises UserError that names message and key if something is missing, empty, or not known. Which roles may follow
    each other is up to the template.
    """
    # Tables have every column in every row.
    present = [key for key in ("messages", "conversations") if row.get(key) is not None]
    if len(present) == 2:
        raise UserError("the row has messages and conversations", "Keep one of the two.")
    key = present[0] if present else next((key for key in ("messages", "conversations") if key in row), None)
    if key is None:
        raise UserError(
            f"neither messages nor conversations is among the keys {', '.join(map(str, row)) or '(none)'}",
            "give chats one of these keys, or set the kind of the source to what its rows are",
        )
    rows = row[key]
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{key} is {_shown(rows)}, not a list of messages", MEND)
    read = [_read_message(f"{key}[{index}]", message) for index, message in enumerate(rows)]
    messages = [message for message in read if message is not None]
    if not messages:
        raise UserError(f"{key} holds only empty messages of the system", MEND)
    return _with_system(row, messages)


def read_instruct(row: Mapping[str, Any], template: "ChatTemplate") -> list[Message]:
    """The messages of a row {instruction, input, output}; the template says how instruction and input are joined."""
    instruction, output = (_text(key, row.get(key)) for key in ("instruction", "output"))
    given = row.get("input")
    messages = [Message("user", instruction), Message("assistant", output)]
    if given is not None and (not isinstance(given, str) or given.strip()):
        messages[0] = Message("user", instruction + template.input_joint + _text("input", given))
        if template.input_system is not None and not any(_holds(row.get(key)) for key in SYSTEM):
            messages.insert(0, Message("system", template.input_system))
    return _with_system(row, messages)


def _read_message(place: str, row: Any) -> Message | None:
    """A message; None if it is an empty one of the system, which says as much as none."""
    if not isinstance(row, Mapping):
        raise UserError(f"{place} is {_shown(row)}, not a message", "write it as {role, content} or {from, value}")
    shares = any(row.get(key) is not None for key in ("from", "value"))
    keys = ("from", "value") if shares else ("role", "content")
    role_key, content_key = keys
    _refuse_unknown(place, row, keys)
    if role_key not in row:
        raise UserError(f"{place} has no {role_key!r}", f"its keys are {', '.join(map(str, row)) or '(none)'}")
    role = ROLES.get(row[role_key]) if isinstance(row[role_key], str) else None
    if role is None:
        raise UserError(f"{place}.{role_key} is {_shown(row[role_key])}", f"roles are {', '.join(ROLES)}")
    content = row.get(content_key)
    if role == "system" and not _holds(content):
        return None
    return Message(role, _text(f"{place}.{content_key}", content), _weight(place, row))


def _refuse_unknown(place: str, row: Mapping[str, Any], keys: Iterable[str]) -> None:
    known = (*keys, "weight", *SWITCHES)
    for key, value in row.items():
        # False is not nothing: an unknown switch may be off.
        if key not in known and key not in LABELS and value is not None and value not in ("", [], {}):
            raise UserError(
                f"{place} has {key} = {_shown(value)}, which is neither its text nor a known flag",
                f"Leave such rows out, or take the key out of the message if it does not matter; flags are weight, "
                f"{', '.join(SWITCHES)}.",
            )


def _holds(content: Any) -> bool:
    """Whether a content is more than null, blanks, or an empty list."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return any(_holds(part.get("text")) for part in content)
    return bool(content.strip()) if isinstance(content, str) else content is not None


def _text(place: str, content: Any) -> str:
    """A text, whole or as OpenAI's list of parts."""
    if isinstance(content, list) and content:
        for index, part in enumerate(content):
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise UserError(f"{place}[{index}] is {_shown(part)}", 'only parts {type: "text", text} are known')
        content = "".join(part["text"] for part in content)
    if content is None:
        raise UserError(f"{place} is missing", MEND)
    if not isinstance(content, str):
        raise UserError(f"{place} is {_shown(content)}, not a text", MEND)
    if not content.strip():
        raise UserError(f"{place} is empty", MEND)
    return content


def _weight(place: str, row: Mapping[str, Any]) -> float | None:
    """How much a message counts, by its weight or its switches; None if it has neither."""
    said = {key: row[key] for key in ("weight", *SWITCHES) if row.get(key) is not None}
    for key, value in said.items():
        number = isinstance(value, int | float) and not (isinstance(value, bool) and key == "weight")
        if key == "weight" and not (number and 0 <= value <= MOST_WEIGHT):
            raise UserError(
                f"{place}.weight is {_shown(value)}", "a weight is a number, 0 or more, that float32 can hold"
            )
        if key != "weight" and not (number and value in (0, 1)):
            raise UserError(f"{place}.{key} is {_shown(value)}", "Write true or false, or use weight for a number.")
    weights = {float(value) for value in said.values()}
    if len(weights) > 1:
        shown = " and ".join(f"{key} = {_shown(value)}" for key, value in said.items())
        raise UserError(f"{place} has {shown}, which disagree", "Keep one of them.")
    return weights.pop() if weights else None


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages after the row's own message of the system, which some data sets keep apart."""
    for key in NOT_A_CHAT:
        if row.get(key):
            raise UserError(f"the row has {key}, which would be lost", "leave such rows out, or put it into messages")
    for key in OF_ROWS:
        if (value := row.get(key)) is not None and value is not True and value != 1:
            raise UserError(
                f"the row has {key} = {_shown(value)}, which would change the loss of all its messages",
                "Give each message its own weight or train flag, or rename the key if it means something else.",
            )
    said = {key: row[key] for key in SYSTEM if _holds(row.get(key))}
    if not said:
        return messages
    texts = {_text(key, value) for key, value in said.items()}
    if len(texts) > 1:
        raise UserError(f"the row has {' and '.join(said)}, which differ", "Keep one of them.")
    text = texts.pop()
    if messages[0].role == "system":
        if messages[0].content == text:
            return messages
        raise UserError(f"the row has {next(iter(said))}, and a message of the system too", "keep one of the two")
    return [Message("system", text), *messages]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
