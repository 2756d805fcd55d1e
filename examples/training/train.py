"""Trains a small Llama on plain text and writes it in Hugging Face layout; see README.md.

python train.py BOOKS -o OUT [--heldout book.txt] [--minutes 9]
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import encode, read_texts, save_tokenizer, train_tokenizer, windows
from llama import Llama, Shape
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

SHARD_BYTES = 16 << 20
STATE = "training.pt"


@dataclass(frozen=True)
class Plan:
    """What decides the result, besides text and sizes; a run is resumed with the same one."""

    epochs: int = 8
    batch: int = 32
    length: int = 2048
    rate: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    warmup: float = 0.02  # share of the way in which the rate rises
    seed: int = 0


def main(arguments: list[str] | None = None) -> None:
    """Train, and write OUT."""
    options = parse(arguments)
    device = torch.device(options.device)
    out, partial = options.out, options.out.with_name(options.out.name + ".partial")
    if out.exists():
        sys.exit(f"{out} is there already; name another folder or remove it.")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        ids, tokenizer = prepare(options, partial)
        heldout = None
        if options.heldout is not None:
            heldout = encode(read_texts(options.heldout), tokenizer)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    shape = Shape(
        **{
            f.name: getattr(options, f.name) for f in dataclasses.fields(Shape) if f.name != "vocab"
        },
        vocab=tokenizer.get_vocab_size(),
    )
    plan = Plan(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Plan)})
    torch.manual_seed(plan.seed)
    model = Llama(shape, plan.dropout).to(device)
    count = sum(weight.numel() for weight in model.parameters())
    note(f"{count / 1e6:.1f} M parameters, {len(ids) / 1e6:.1f} M tokens, {device}")
    history = train(model, ids, heldout, plan, partial, options)
    export(model, tokenizer, history, partial)
    (partial / STATE).unlink(missing_ok=True)
    (partial / "tokens.pt").unlink(missing_ok=True)
    partial.rename(out)
    note(f"{out}: {history[-1] if history else 'untrained'}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; sizes and plan have an option for each field."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("books", type=Path, help=".txt or .txt.xz file, or a folder of them")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--heldout", type=Path, help="text that is only judged on")
    parser.add_argument("--separator", help="what stands between the texts of one file")
    parser.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.json to use; default: train one"
    )
    parser.add_argument(
        "--vocab", type=int, default=Shape.vocab, help="size of a trained tokenizer"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time for training at most")
    parser.add_argument("--save-seconds", type=float, default=60.0, help="between saved states")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    for kind in (Shape, Plan):
        for field in dataclasses.fields(kind):
            if field.name != "vocab":
                name = "--" + field.name.replace("_", "-")
                parser.add_argument(name, type=type(field.default), default=field.default, help=" ")
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace, folder: Path) -> tuple[Tensor, Tokenizer]:
    """All token ids and the tokenizer; made once, then read from ``folder``."""
    own, tokens = folder / "tokenizer.json", folder / "tokens.pt"
    if tokens.is_file() and own.is_file():
        return torch.load(tokens), Tokenizer.from_file(str(own))
    texts = read_texts(options.books, options.separator)
    if options.tokenizer is not None:
        tokenizer = Tokenizer.from_file(str(options.tokenizer))
    else:
        note(f"training a tokenizer of {options.vocab} tokens on {len(texts)} texts")
        tokenizer = train_tokenizer(texts, options.vocab)
    ids = encode(texts, tokenizer)
    save_tokenizer(tokenizer, folder, options.context)
    _write(tokens, lambda file: torch.save(ids, file))
    return ids, tokenizer


def train(
    model: Llama,
    ids: Tensor,
    heldout: Tensor | None,
    plan: Plan,
    folder: Path,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Train in place, from the state in ``folder`` if there is one; what was measured per epoch."""
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, plan)
    steps = plan.epochs * -(-len(windows(ids, plan.length, plan.seed, 0)) // plan.batch)
    step, spent, history = 0, 0.0, []
    saved = folder / STATE
    settings = {**dataclasses.asdict(plan), **dataclasses.asdict(model.shape)}
    if saved.is_file():
        state = torch.load(saved, map_location=device)
        if state["settings"] != settings:
            sys.exit(f"{folder} was begun with other sizes; remove it or use the same options.")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, history = state["step"], state["spent"], state["history"]
        note(f"going on at step {step}")
    forward = torch.compile(model) if options.compile else model
    begun = last_save = last_note = time.monotonic()
    seen = 0
    for number, epoch, batch, is_last in schedule(ids, plan, step):
        elapsed = spent + time.monotonic() - begun
        way = max((number + 0.5) / steps, elapsed / (60 * options.minutes))
        if way >= 1:
            note("the time is over")
            break
        rate = plan.rate * min(1.0, way / plan.warmup) * (0.05 + 0.95 * _cosine(way))
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        # Dropout is drawn anew in every step, whether the run was interrupted or not.
        torch.manual_seed(plan.seed + number)
        loss = step_loss(forward, batch.to(device, non_blocking=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += batch.numel()
        now = time.monotonic()
        if now - last_note > 10:
            last_note = now
            speed = seen / (now - begun)
            note(
                f"step {number + 1}/{steps}, loss {float(loss.detach()):.3f}, {speed:,.0f} tokens/s"
            )
        if is_last:
            history.append(
                {
                    "epoch": epoch + 1,
                    "seconds": round(spent + time.monotonic() - begun, 1),
                    "loss": round(float(loss.detach()), 4),
                    **({} if heldout is None else judge(model, heldout, plan.length)),
                }
            )
            note(json.dumps(history[-1]))
        if is_last or now - last_save > options.save_seconds:
            last_save = now
            state = {
                "settings": settings,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": number + 1,
                "spent": spent + time.monotonic() - begun,
                "history": history,
            }
            _write(saved, lambda file, state=state: torch.save(state, file))
    if heldout is not None and (not history or history[-1]["epoch"] < plan.epochs):
        history.append({"epoch": None, **judge(model, heldout, plan.length)})
    return history


def schedule(ids: Tensor, plan: Plan, first: int) -> Iterator[tuple[int, int, Tensor, bool]]:
    """(step, epoch, windows [B, length + 1], whether it ends the epoch) from step ``first`` on."""
    number = 0
    for epoch in range(plan.epochs):
        batches = windows(ids, plan.length, plan.seed, epoch).split(plan.batch)
        for at, batch in enumerate(batches):
            if number >= first:
                yield number, epoch, batch, at == len(batches) - 1
            number += 1


def step_loss(model: Any, batch: Tensor) -> Tensor:
    """Mean cross-entropy of predicting every id of the windows [B, T + 1] but the first."""
    with mixed(batch.device):
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def judge(model: Llama, ids: Tensor, length: int) -> dict[str, float]:
    """Perplexity on windows without overlap, as ``qoq eval ppl`` cuts them."""
    model.eval()
    device = next(model.parameters()).device
    count = len(ids) // length
    losses = []
    for window in ids[: count * length].view(count, length):
        with mixed(device):
            logits = model(window[None, :-1].to(device))
        losses.append(F.cross_entropy(logits[0].float(), window[1:].to(device)).item())
    return {"heldout_ppl": round(math.exp(sum(losses) / len(losses)), 3)} if losses else {}


def make_optimizer(model: Llama, plan: Plan) -> torch.optim.AdamW:
    """AdamW; gains of norms are not decayed."""
    weights = [w for w in model.parameters() if w.ndim == 2]
    gains = [w for w in model.parameters() if w.ndim != 2]
    groups = [{"params": weights, "weight_decay": plan.weight_decay}, {"params": gains}]
    fused = weights[0].device.type == "cuda"
    return torch.optim.AdamW(groups, plan.rate, (0.9, 0.95), weight_decay=0.0, fused=fused)


def export(model: Llama, tokenizer: Tokenizer, history: list[dict[str, Any]], folder: Path) -> None:
    """config.json, bf16 shards with their index, training.json."""
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, weight in model.state_dict().items():
        tensor = weight.detach().to("cpu", torch.bfloat16).contiguous()
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES - (64 << 10):  # room for the header
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    names = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(shard, file))
    ids = [tokenizer.token_to_id(token) for token in ("<|bos|>", "<|eos|>", "<|pad|>")]
    special = dict(zip(("bos", "eos", "pad"), ids, strict=True))
    files = {
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": names},
        "config.json": model.shape.config(**special),
        "generation_config.json": {
            **{f"{name}_token_id": value for name, value in special.items()},
            "do_sample": True,
            "temperature": 0.8,
            "top_p": 0.95,
        },
        "training.json": history,
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def mixed(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 products on a GPU; a CPU computes in fp32."""
    on = device.type == "cuda"
    return torch.autocast("cuda", torch.bfloat16) if on else contextlib.nullcontext()


def note(text: str) -> None:
    """A line for the reader."""
    print(text, file=sys.stderr, flush=True)


def _cosine(way: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * way))


def _write(file: Path, save: Any) -> None:
    """The file whole, or as it was before."""
    fresh = file.with_name(file.name + ".new")
    save(fresh)
    fresh.replace(file)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written; defaults behind each option."""


if __name__ == "__main__":
    main()
