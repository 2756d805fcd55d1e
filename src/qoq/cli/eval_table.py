"""``qoq eval table`` and ``qoq eval render``: accuracy tables, measured and put in documents."""

import json as json_module
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qoq.cli.eval_ppl import choose_text, default_seq_len
from qoq.cli.options import CALIBRATION, DEVICE, JSON, SEED, THREADS, use_threads
from qoq.cli.terminal import bar, emit, note, verb

QUICK_WINDOWS, QUICK_SAMPLES = 8, 32
WINDOWS, SAMPLES = 24, 128


@verb("Rows that were finished are in the --save file; --resume goes on with them.")
def table(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Full-precision model: folder or hub id.")
    ],
    rows: Annotated[
        str,
        typer.Option(
            help="quick (few rows, minutes), accuracy (every scheme, and the recipe's passes added "
            "one by one), parts (weights, activations, keys, values alone), keys (ways to prepare "
            "them), leave-one-out (the recipe without each pass), or full (all; hours)."
        ),
    ] = "quick",
    recipe: Annotated[str, typer.Option(help="The recipe to take apart.")] = "qoq",
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            help="Also judge this packed checkpoint of SOURCE (repeatable). With --rows quick it "
            "stands in for quantizing anew."
        ),
    ] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text file (repeatable).")] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="Text by name, as in `qoq eval ppl` (repeatable). Default without --text: of "
            "heldout and wikitext2 those that lie beside the model (quick: the first)."
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(help=f"Windows per text. Default: {WINDOWS} (quick: {QUICK_WINDOWS})."),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens per window. Default: 2048, or the model's context if shorter."),
    ] = None,
    calibration: CALIBRATION = "built-in",
    samples: Annotated[
        int | None,
        typer.Option(help=f"Calibration samples. Default: {SAMPLES} (quick: {QUICK_SAMPLES})."),
    ] = None,
    calibration_seq_len: Annotated[int, typer.Option(help="Tokens per sample.")] = 1024,
    seed: SEED = 0,
    save: Annotated[
        Path | None, typer.Option(help="Write results as JSON here, anew after every row.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Take over rows of the --save file (same settings; measured by the same code).",
        ),
    ] = False,
    device: DEVICE = "auto",
    threads: THREADS = None,
    json: JSON = False,
) -> None:
    """Judge many schemes against full precision, on the same texts.

    Each row is quantized into a temporary folder through the same pipeline as `qoq quantize`,
    judged in its packed form, and deleted. KL is that from full precision, in nats per token.

    Examples:

        qoq eval table MODEL

        qoq eval table MODEL --rows full --save accuracy.json && qoq eval render accuracy.json

    --json prints what --save writes: command, commit, date, hardware, source, calibration, texts
    (name, seq_len, windows), and tables: name -> rows of label, scheme, recipe, and results by text
    (perplexity, tokens, kl_mean, kl_p99, top1_agreement).
    """
    from qoq.checkpoint.hf import resolve_source
    from qoq.errors import SchemeError, TextError
    from qoq.evaluate.cases import GROUP, make_tables
    from qoq.evaluate.provenance import provenance
    from qoq.evaluate.simulate import Calibrated
    from qoq.evaluate.table import Row, known_results, measure
    from qoq.evaluate.texts import windows as cut
    from qoq.formats.scheme import QuantScheme
    from qoq.kernels.device import choose_device
    from qoq.quantize.recipe import load_recipe
    from qoq.tokenizer import Tokenizer

    if resume and save is None:
        raise SchemeError("--resume needs the file: add --save FILE.")
    use_threads(threads)
    quick = rows == "quick"
    folder = resolve_source(source)
    chosen = load_recipe(recipe, QuantScheme.parse(GROUP))
    tables = make_tables(rows, chosen, tuple(checkpoint or ()))
    found = [choose_text(file, None, []) for file in text or ()]
    found += [choose_text(None, name, [folder]) for name in dataset or _beside(folder, text)]
    found = found[:1] if quick and not text and not dataset else found
    tokenizer = Tokenizer.load(folder)
    length = seq_len or default_seq_len(folder)
    limit = windows or (QUICK_WINDOWS if quick else WINDOWS)
    parts = {part.name: cut(part, tokenizer, length, limit) for part in found}
    if len(parts) < len(found):
        raise TextError("Two texts have the same name; rename one of the files.")
    count = samples or (QUICK_SAMPLES if quick else SAMPLES)
    calibrated = Calibrated(calibration, count, calibration_seq_len, seed)
    where = str(choose_device(device).device)
    settings: dict[str, Any] = {
        "source": folder.name,
        "calibration": calibrated.to_dict(),
        "texts": [
            {"name": name, "seq_len": length, "windows": len(part)} for name, part in parts.items()
        ],
        **({} if where == "cpu" else {"device": where}),
    }
    measured: dict[str, Any] = {**provenance(sys.argv[1:]), **settings, "tables": {}}
    known = {}
    if save and resume:
        earlier = _load(save, settings)
        if earlier and earlier.get("code") != measured["code"]:
            note("The program has changed since those rows were measured: all are measured anew.")
        else:
            known = known_results(earlier, tables)

    def keep(name: str, row: Row) -> None:
        measured["tables"].setdefault(name, []).append(row.to_dict())
        if save:
            _write(save, measured)

    if not json:
        note(_announcement(measured, sum(map(len, tables.values()))))
    with bar("rows", quiet=json) as report:
        measure(
            folder,
            tables,
            parts,
            calibrated,
            known=known,
            report=report,
            finished=keep,
            device=where,
        )
    if json:
        emit(measured)
        return
    for name, lines in measured["tables"].items():
        _show(name, lines, measured["texts"])


@verb()
def render(
    results: Annotated[
        Path, typer.Argument(metavar="RESULTS", help="What `qoq eval table --save` wrote.")
    ],
    into: Annotated[
        list[Path] | None, typer.Option(help="Document to fill (repeatable). Default: print.")
    ] = None,
    json: JSON = False,
) -> None:
    """Turn saved results into markdown tables, in documents between markers.

    A document marks places with <!-- NAME:begin --> and <!-- NAME:end -->; NAME is accuracy,
    summary (accuracy without the ablation's steps), parts, keys, leave-one-out or provenance.

    Example:

        qoq eval render benchmarks/results/accuracy.json --into docs/accuracy.md --into README.md

    --json prints: sections (name -> markdown), filled (documents).
    """
    from qoq.checkpoint.files import atomic_file
    from qoq.evaluate.render import fill, sections

    parts = sections(_load(results))
    for document in into or ():
        new = fill(document.read_text(encoding="utf-8"), parts)
        with atomic_file(document) as file:
            file.write(new.encode())
    if json:
        emit({"sections": parts, "filled": [str(document) for document in into or ()]})
    elif into:
        note(f"filled {', '.join(map(str, into))}")
    else:
        print("\n\n".join(f"### {name}\n\n{part}" for name, part in parts.items()))


def _beside(folder: Path, text: list[Path] | None) -> list[str]:
    """The known datasets that lie beside the model; wikitext2 (from the hub) if none does."""
    from qoq.evaluate.texts import BESIDE

    if text:
        return []
    there = [n for n, files in BESIDE.items() if any((folder / f).is_file() for f in files)]
    return sorted(there) or ["wikitext2"]


def _load(file: Path, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Saved results; {} where there is no file yet and ``settings`` are to be those of its rows."""
    from qoq.errors import TextError

    if settings is not None and not file.exists():
        return {}
    try:
        saved = json_module.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TextError(f"There is no file {file}; make it with `qoq eval table --save`.") from None
    except ValueError as error:
        raise TextError(f"{file} is no saved result of `qoq eval table` ({error}).") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("tables"), dict):
        raise TextError(f"{file} is no saved result of `qoq eval table`.")
    if settings is not None and any(saved.get(key) != value for key, value in settings.items()):
        raise TextError(f"{file} was measured with other settings; save to another file.")
    return saved


def _write(file: Path, measured: Mapping[str, Any]) -> None:
    from qoq.checkpoint.files import atomic_file, dump_json

    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as out:
        out.write(dump_json(dict(measured)))


def _announcement(measured: Mapping[str, Any], count: int) -> str:
    calibration = measured["calibration"]
    texts = ", ".join(
        f"{t['windows']} x {t['seq_len']} tokens of {t['name']}" for t in measured["texts"]
    )
    return (
        f"{count} rows on {texts}; calibrated on {calibration['samples']} x "
        f"{calibration['seq_len']} tokens of {calibration['source']}."
    )


def _show(name: str, rows: Sequence[Mapping[str, Any]], texts: Sequence[Mapping[str, Any]]) -> None:
    """One table per text, narrow enough for any terminal."""
    from rich.console import Console
    from rich.table import Table

    from qoq.evaluate.render import HEADS, cells

    for text in texts:
        title = f"{name}: {text['name']}, {text['windows']} windows of {text['seq_len']} tokens"
        grid = Table(title=title, title_justify="left")
        grid.add_column("")
        for head in HEADS:
            grid.add_column(head, justify="right", no_wrap=True)
        for row in rows:
            grid.add_row(row["label"], *cells(row["results"][text["name"]]))
        Console().print(grid)
