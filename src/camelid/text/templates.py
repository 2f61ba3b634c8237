"""Chat templates by name, with the same output as the templates of the released models, or those of fschat."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camelid.errors import UserError
from camelid.inputs import decode
from camelid.text.added_tokens import CONFIG, read_object

CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class NamedTemplate:
    text: str
    """The jinja source."""
    input_joint: str = "\n\n"
    """Separator between the instruction and the input of an instruction example."""
    input_system: str | None = None
    """System message of an instruction example that has an input; None for no such message."""


# Separates the system message from the turns, which must alternate.
_TURNS = """
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] %}
{%- set turns = messages[1:] %}
{%- else %}
{%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('after the optional system message, user and assistant must take turns') }}
{%- endif %}
{%- endfor %}
"""

LLAMA2 = (
    _TURNS
    + """
{%- for message in turns %}
{%- set content = message['content'] %}
{%- if loop.first and system is defined %}
{%- set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content %}
{%- endif %}
{%- if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}
{{- ' ' + content.strip() + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""
)

LLAMA3 = """
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

MISTRAL = (
    _TURNS
    + """
{{- bos_token }}
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{{- ' [INST] ' + (system + '\n\n' if loop.first and system is defined else '') + message['content'] + ' [/INST]' }}
{%- else %}
{{- ' ' + message['content'] + eos_token }}
{%- endif %}
{%- endfor %}"""
)

GEMMA = (
    _TURNS
    + """
{{- bos_token }}
{%- for message in turns %}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' }}
{{- system + '\n\n' if loop.first and system is defined else '' }}
{{- message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\n' }}
{%- endif %}"""
)

PHI = """
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}
{%- endfor %}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token }}"""

VICUNA = (
    _TURNS
    + """
{{- bos_token }}
{%- if system is defined %}
{{- system }}
{%- else %}
{{- "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, " }}
{{- "and polite answers to the user's questions." }}
{%- endif %}
{{- ' ' }}
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{{- 'USER: ' + message['content'] + ' ' }}
{%- else %}
{{- 'ASSISTANT: ' + message['content'] + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'ASSISTANT:' }}
{%- endif %}"""
)

ALPACA_INPUT_SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALPACA = (
    _TURNS
    + """
{{- bos_token }}
{%- if system is defined %}
{{- system + '\n\n' }}
{%- else %}
{{- "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n" }}
{%- endif %}
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{{- '### Instruction:\n' + message['content'] }}
{%- else %}
{{- '### Response:\n' + message['content'] + eos_token }}
{%- endif %}
{{- '' if loop.last else '\n\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '\n\n### Response:\n' }}
{%- endif %}"""
)

CHATML = """
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}"""

ZEPHYR = """
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\n' }}
{%- endif %}"""

NAMED = {
    "llama2": NamedTemplate(LLAMA2),
    "llama3": NamedTemplate(LLAMA3),
    "mistral": NamedTemplate(MISTRAL),
    "gemma": NamedTemplate(GEMMA),
    "phi": NamedTemplate(PHI),
    "vicuna_v1.1": NamedTemplate(VICUNA),
    "alpaca": NamedTemplate(ALPACA, input_joint="\n\n### Input:\n", input_system=ALPACA_INPUT_SYSTEM),
    "chatml": NamedTemplate(CHATML),
    "zephyr": NamedTemplate(ZEPHYR),
}


def read_chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The templates by name, from the file that takes precedence in transformers."""
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        try:
            own: Any = decode(file.read_bytes())
        except UnicodeError as error:
            raise UserError(f"{file} is not text: {error}", "Save it as UTF-8, or remove it.") from error
    else:
        file = folder / CONFIG
        own = config.get("chat_template")
        if not own:
            file = folder / "chat_template.json"
            own = read_object(file).get("chat_template")
    named = {"default": own} if isinstance(own, str) or not own else _by_name(own)
    if named is None or not all(isinstance(text, str) for text in named.values() if text is not None):
        raise UserError(
            f"chat_template in {file} is neither a text nor a list of objects with name and template",
            "Correct it, or copy the file from the original checkpoint again.",
        )
    return {name: text for name, text in named.items() if text}


def _by_name(templates: Any) -> dict[str, Any] | None:
    if isinstance(templates, list) and all(isinstance(entry, dict) for entry in templates):
        return {str(entry.get("name")): entry.get("template", 0) for entry in templates}
    return templates if isinstance(templates, dict) else None
