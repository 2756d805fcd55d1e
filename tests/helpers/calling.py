"""A model that can be made to call tools: templates, functions, and texts it is led to write.

A random model calls nothing by itself, so a request brings a grammar of one text (the model still
draws its tokens one by one), and everything after that is what any model's text goes through.
"""

import json
import re
from pathlib import Path
from typing import Any

from helpers.tiny import write_tiny_llama
from qoq.tokenizer import Tokenizer

# Shows all that a template may be given.
TEMPLATE = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% if tools %}As <tool_call>.\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}{{ ' ' + m.tool_call_id if m.tool_call_id }}] "
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.id }} "
    "{{ c.function | tojson }}</tool_call>{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# As Qwen and Hermes have them: one that hides like other special tokens, one that does not.
MARKS = {"<tool_call>": True, "</tool_call>": True, "<think>": False}
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 99},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Any = None, **more: Any) -> Any:
    """An entry of tools, as chat completions have it."""
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [tool("weather", WEATHER, description="Of a city."), tool("now")]


def write_calling_llama(folder: Path, *, marks: bool = True) -> None:
    """A random Llama whose template has tools; ``marks`` of calls are tokens of their own."""
    tokenizer = {"template": TEMPLATE, "added": MARKS if marks else {}}
    write_tiny_llama(folder, seed=5, tokenizer=tokenizer, max_position_embeddings=2048)


def led_to(text: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Fields of a request whose answer is ``text``, marks as the tokens they are."""
    vocabulary = tokenizer.hf.get_vocab()
    pieces = re.split(f"({'|'.join(map(re.escape, MARKS))})", text)
    steps = [
        f"<[{vocabulary[p]}]>" if p in MARKS and p in vocabulary else json.dumps(p)
        for p in pieces
        if p
    ]
    return {"structured_outputs": {"grammar": f"start: {' '.join(steps)}\n"}}


def obeys(arguments: str) -> bool:
    """Whether JSON text is what WEATHER asks for."""
    value = json.loads(arguments)
    return (
        set(value) == {"city", "days", "unit"}
        and isinstance(value["city"], str)
        and len(value["city"]) <= 8
        and type(value["days"]) is int
        and 1 <= value["days"] <= 99
        and value["unit"] in ("C", "F")
    )
