"""``qoq eval ppl``: perplexity of one model and its distance from full precision."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qoq.cli.options import CALIBRATION, DEVICE, JSON, SEED, THREADS, use_threads
from qoq.cli.terminal import bar, emit, note, verb

if TYPE_CHECKING:
    from qoq.evaluate.perplexity import Result
    from qoq.evaluate.texts import Text


@verb()
def ppl(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Packed checkpoint, source folder or hub id.")
    ],
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to judge on: .txt or .txt.xz.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Text by name: wikitext2, heldout (as files beside the model), or a hub dataset "
            "owner/name[:config] (needs the `datasets` package). Default without --text: heldout "
            "if it lies beside the model, else wikitext2."
        ),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens per window. Default: 2048, or the model's context if shorter."),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="Judge on the first N windows only. Default: all.")
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="Quantize MODEL in a temporary folder first: rtn-w4a8kv4-g128, qoq-w4a8kv4-g128, "
            "published-w4a8kv4, or a plain scheme name (round to nearest)."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Full-precision model to compare with: adds KL divergence and top-1 agreement. "
            "With --scheme, MODEL itself unless you name another."
        ),
    ] = None,
    calibration: CALIBRATION = "built-in",
    samples: Annotated[int, typer.Option(help="Calibration samples (with --scheme).")] = 128,
    calibration_seq_len: Annotated[
        int, typer.Option(help="Tokens per calibration sample (with --scheme).")
    ] = 1024,
    seed: SEED = 0,
    device: DEVICE = "auto",
    threads: THREADS = None,
    json: JSON = False,
) -> None:
    """Perplexity of a model: windows without overlap, as in the papers.

    Every token but a window's first is predicted; the last partial window is dropped. No BOS is
    put in front of windows: a text is encoded once, as the tokenizer does by itself. A packed
    checkpoint is judged over its own quantized KV cache.

    With --reference also the KL divergence from that model per token (mean and 99th percentile, in
    nats) and the share of tokens on which both would choose the same one. Perplexity can hide
    damage, on small models above all; KL does not.

    Examples:

        qoq eval ppl OUT --reference MODEL --dataset wikitext2

        qoq eval ppl MODEL --scheme rtn-w4a8kv4-g128 --text book.txt --windows 8

    --json prints: model, scheme, text, seq_len, windows, perplexity, tokens, kl_mean, kl_p99,
    top1_agreement (null without a reference; a perplexity beyond all bounds is null too).
    """
    from qoq.checkpoint.hf import resolve_source
    from qoq.errors import RequestError
    from qoq.evaluate.perplexity import evaluate
    from qoq.evaluate.simulate import Calibrated, parse_simulation, simulate
    from qoq.evaluate.texts import windows as cut
    from qoq.kernels.device import choose_device
    from qoq.models.load import load_model
    from qoq.tokenizer import Tokenizer

    if windows is not None and windows < 1:
        raise RequestError(f"--windows must be 1 or more, not {windows}.")
    use_threads(threads)
    simulation = parse_simulation(scheme) if scheme else None
    folder = resolve_source(model)
    other = folder if reference is None and simulation else None
    other = resolve_source(reference) if reference else other
    found = choose_text(text, dataset, [f for f in (folder, other) if f])
    tokenizer = Tokenizer.load(folder)
    length = seq_len or default_seq_len(folder)
    parts = cut(found, tokenizer, length, windows)
    where = str(choose_device(device).device)
    beside = load_model(other, device=where) if other else None
    if simulation:
        name, recipe = simulation
        with bar(f"quantizing to {scheme}", quiet=json) as steps:
            calibrated = Calibrated(calibration, samples, calibration_seq_len, seed)
            loaded = simulate(folder, name, recipe, calibrated, device=where, steps=steps)
    else:
        loaded = load_model(folder, device=where)
    with bar(f"judging on {found.name}", quiet=json) as update:
        result = evaluate(loaded, parts, beside, progress=update)
    answer: dict[str, Any] = {
        "model": model,
        "scheme": scheme or loaded.scheme.name,
        "text": found.name,
        "seq_len": length,
        "windows": len(parts),
        **result.to_dict(),
    }
    if json:
        emit(answer)
        return
    note(f"{answer['scheme']} on {found.name}, {len(parts)} windows of {length} tokens")
    print(describe(result))


def choose_text(text: Path | None, dataset: str | None, folders: list[Path]) -> "Text":
    """The text the options name; without any, heldout beside a model or else wikitext2."""
    from qoq.errors import TextError
    from qoq.evaluate.texts import BESIDE, find_dataset, read_text

    if text is not None and dataset is not None:
        raise TextError("Give either --text or --dataset, not both.")
    if text is not None:
        return read_text(text)
    if dataset is None:
        held = any((folder / n).is_file() for folder in folders for n in BESIDE["heldout"])
        dataset = "heldout" if held else "wikitext2"
    return find_dataset(dataset, *folders)


def default_seq_len(folder: Path) -> int:
    """The paper's 2048, or a shorter model's whole context."""
    from qoq.checkpoint.hf import CONFIG_NAME, read_json_object
    from qoq.models.config import ModelConfig

    raw = read_json_object(folder / CONFIG_NAME)
    return min(2048, ModelConfig.from_hf(raw).max_positions)


def describe(result: "Result") -> str:
    """A result as a few lines for a reader."""
    lines = [f"perplexity      {result.perplexity:.4f}   ({result.tokens:,} tokens)"]
    if result.kl_mean is not None:
        lines += [
            f"KL mean         {result.kl_mean:.3e} nats per token",
            f"KL 99 %         {result.kl_p99:.3e}",
            f"top-1 agreement {result.top1_agreement:.2%}",
        ]
    return "\n".join(lines)
