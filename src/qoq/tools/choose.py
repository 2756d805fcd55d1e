"""Which parser a model's calls need, by the marks in its chat template or by its family."""

from qoq.tools.parsers import PARSERS

# Marks that a template teaches or shows its model, most telling first; None: written in a way that
# none of the parsers reads.
_MARKS: tuple[tuple[str, str | None], ...] = (
    ("<function=", None),
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary of argument name and its value', "llama3_json"),
)
_FAMILIES = {
    "llama": "llama3_json",
    "mistral": "mistral",
    "qwen2": "hermes",
    "qwen3": "hermes",
}


def choose_parser(chat_template: str | None, model_type: str = "") -> str | None:
    """The name in PARSERS of the parser to take, or None where no known way fits.

    model_type is config.json's. A family decides only where the template mentions tools but shows
    none of the known marks: a template without tools cannot ask for calls.
    """
    template = chat_template or ""
    for mark, name in _MARKS:
        if mark in template:
            return name
    name = _FAMILIES.get(model_type) if "tools" in template else None
    assert name is None or name in PARSERS
    return name
