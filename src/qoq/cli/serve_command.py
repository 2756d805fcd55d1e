"""How ``qoq serve`` reads its command line: as other serving engines' users type it.

Dashes and underscores are the same, options that take several values take them in a row, and a YAML
file may hold any of them.
"""

import json
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from qoq.cli.terminal import fail
from qoq.errors import RequestError

# Options of other engines that say what needs no saying here, or what we cannot do.
_FROM_CHECKPOINT = "the checkpoint says so itself (`qoq quantize` chooses it); leave it out"
_ONE_PROCESS = "one process serves the whole model on one machine; leave it out"
_ELSEWHERE = {
    "--dtype": _FROM_CHECKPOINT,
    "--quantization": _FROM_CHECKPOINT,
    "--kv-cache-dtype": _FROM_CHECKPOINT,
    "--kv-cache-dtype-skip-layers": _FROM_CHECKPOINT,
    "--load-format": _FROM_CHECKPOINT,
    "--tensor-parallel-size": _ONE_PROCESS,
    "-tp": _ONE_PROCESS,
    "--pipeline-parallel-size": _ONE_PROCESS,
    "--data-parallel-size": _ONE_PROCESS,
    "--distributed-executor-backend": _ONE_PROCESS,
    "--no-enable-chunked-prefill": "prompts are always read in chunks (--max-num-batched-tokens)",
    "--gpu-memory-utilization": "use --kv-cache-memory-fraction or --kv-cache-memory-bytes",
    "--trust-remote-code": "no code that came with a model is ever run; leave it out",
    "--enable-lora": "LoRA adapters are not supported; merge them into the model first",
    "--lora-modules": "LoRA adapters are not supported; merge them into the model first",
    "--reasoning-parser": "reasoning is left in the answer's text; leave it out",
}
# Theirs that ask for what is always so here.
_ALWAYS = {
    "--enable-chunked-prefill",
    "--enable-prompt-tokens-details",
    "--enable-server-load-tracking",
    "--enable-tokenizer-info-endpoint",
}
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def dashes(name: str) -> str:
    """``--max_num_seqs`` is ``--max-num-seqs``."""
    return name.replace("_", "-")


USAGE = 2  # the exit status of a line that cannot be read


class ServeCommand(TyperCommand):
    """A command with repeatable options in a row and a --config file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Values of the command line win over those of the file."""
        several = {
            opt
            for param in self.params
            if getattr(param, "multiple", False)
            for opt in getattr(param, "opts", ())
        }
        args = spread([arg for arg in args if dashes(arg) not in _ALWAYS], several)
        for arg in args:
            name = dashes(arg.partition("=")[0])
            why = _ELSEWHERE.get(name, _ELSEWHERE.get(name.replace("--no-", "--", 1)))
            if why is not None:
                fail(f"there is no {name} here: {why}.", USAGE)
        file = _config_file(args)
        if file is not None:
            try:
                known = {str(p.name) for p in self.params} - {"config"}
                ctx.default_map = {**(ctx.default_map or {}), **read_config(file, known)}
            except RequestError as error:
                fail(str(error))
        rest: list[str] = super().parse_args(ctx, args)
        return rest


def spread(args: list[str], several: set[str]) -> list[str]:
    """``--served-model-name A B`` as ``--served-model-name A --served-model-name B``.

    Only after the model has been named: before it, the next word is the model.
    """
    out: list[str] = []
    option, model_seen, values = "", False, 0
    for arg in args:
        if arg.startswith("-") and len(arg) > 1:
            option, values = dashes(arg.partition("=")[0]), int("=" in arg)
            out.append(arg)
        elif option in several and values and model_seen:
            out += [option, arg]
        else:
            model_seen = model_seen or not option or values > 0
            values += 1
            out.append(arg)
    return out


def _config_file(args: list[str]) -> Path | None:
    for at, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if dashes(name) == "--config":
            if equals:
                return Path(value)
            return Path(args[at + 1]) if at + 1 < len(args) else None
    return None


def read_config(file: Path, known: set[str]) -> dict[str, Any]:
    """A YAML file's options by parameter name; RequestError for a bad file or an unknown key."""
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        cause = str(error).splitlines()[0]
        raise RequestError(f"--config {file} cannot be read: {cause}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RequestError(f"--config {file} must hold options, one `name: value` per line.")
    found = {str(key).replace("-", "_"): value for key, value in values.items()}
    strange = sorted(set(found) - known)
    if strange:
        raise RequestError(f"--config {file}: there is no option {dashes(strange[0])!r}.")
    return found


def several(values: list[str] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """Values given one by one, or as a JSON list (``'["GET", "POST"]'``) as some users know it."""
    if not values:
        return default
    out: list[str] = []
    for value in values:
        if not value.startswith("["):
            out.append(value)
            continue
        try:
            parts = json.loads(value)
        except ValueError:
            raise RequestError(f"{value!r} is not a JSON list of strings.") from None
        out += [str(part) for part in parts]
    return tuple(out)


def count(text: str | int) -> int:
    """A number, with k, m, g (thousands) or K, M, G (1024s) behind it: ``4G``, ``8k``."""
    text = str(text).strip()
    number, suffix = (text[:-1], text[-1]) if text[-1:].isalpha() else (text, "")
    try:
        return int(float(number) * _SUFFIXES[suffix]) if suffix else int(number)
    except (KeyError, ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is not a number like 4096, 8k or 4G.") from None
