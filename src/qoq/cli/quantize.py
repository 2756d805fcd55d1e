"""``qoq quantize``: a model to a packed checkpoint, judged, with a report to look at."""

import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qoq.cli.check_env import check_device
from qoq.cli.options import CALIBRATION, JSON, OVERWRITE, SEED, THREADS, use_threads
from qoq.cli.terminal import bar, duration, emit, note, size, verb
from qoq.quantize.recipe import PASS_NAMES

if TYPE_CHECKING:
    from qoq.formats.scheme import QuantScheme
    from qoq.quantize.recipe import Recipe


@verb("Finished layers are kept in OUT.partial: the same command goes on there.")
def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Full-precision model: folder or hub id.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to make.")],
    scheme: Annotated[
        str,
        typer.Option(
            help="Bits of weights, activations and KV cache, and the group size: w4a8kv4-g128, "
            "-g64, -g32; w4a8kv4 (per channel); w4a8kv8, w4a8k8v4; w8a8; ..."
        ),
    ] = "w4a8kv4-g128",
    recipe: Annotated[
        str,
        typer.Option(
            help="Which passes run: qoq (ours, default), published (the paper's), rtn (round to "
            "nearest), or a JSON file like the recipe in a checkpoint's config.json."
        ),
    ] = "qoq",
    without: Annotated[
        list[str] | None,
        typer.Option(help=f"Leave out a pass (repeatable): {', '.join(PASS_NAMES)}."),
    ] = None,
    k_rotation: Annotated[
        bool,
        typer.Option("--k-rotation", help="Also rotate queries and keys after RoPE at run time."),
    ] = False,
    calibration: CALIBRATION = "built-in",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per calibration sample.")] = 1024,
    seed: SEED = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        str,
        typer.Option(help="float32, or bfloat16: quicker float products on CPUs that have them."),
    ] = "float32",
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Start over, even if an unfinished run is there.")
    ] = False,
    overwrite: OVERWRITE = False,
    eval_text: Annotated[
        Path | None,
        typer.Option(
            help="Text to judge the result on. Default: windows of the calibration text that were "
            "not calibrated on."
        ),
    ] = None,
    eval_windows: Annotated[int, typer.Option(help="Windows to judge on.")] = 4,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not judge the result.")] = False,
    threads: THREADS = None,
    json: JSON = False,
) -> None:
    """Quantize a model into a packed checkpoint that describes itself.

    Says beforehand what it needs (memory, disk, time) and refuses what cannot fit. Works layer by
    layer in bounded memory; after an interruption the same command goes on at the last finished
    layer. At the end the result is compared with the original (if that fits in memory), and OUT
    gets a README.md (model card) and a report.html with pictures.

    Examples:

        qoq quantize Qwen/Qwen3-0.6B -o qwen3-w4a8kv4

        qoq quantize MODEL -o OUT --scheme w4a8kv4 --calibration text.txt --without reorder

    --json prints: out, scheme, recipe, bytes, source_bytes, bits_per_weight, seconds, report, and
    accuracy (null with --no-eval; else text, windows, seq_len, tokens, perplexity,
    source_perplexity, kl_mean, kl_p99, top1_agreement; the last four null where the original does
    not fit in memory).
    """
    from qoq.checkpoint.hf import resolve_source
    from qoq.formats.scheme import QuantScheme
    from qoq.quantize.pipeline import quantize as run

    use_threads(threads)
    parsed = QuantScheme.parse(scheme)
    chosen = _recipe(recipe, parsed, without or [], k_rotation)
    check_device(device)
    folder = resolve_source(model)
    windows = None if no_eval else _Windows(folder, eval_text, eval_windows)
    if windows is not None:
        windows.check()
    start = time.monotonic()
    if not json:
        note(f"{model} -> {out}: {scheme}, recipe {chosen.name}")
    with bar("quantizing", quiet=json) as progress:
        path = run(
            folder,
            out,
            scheme=scheme,
            recipe=chosen,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            dtype=dtype,
            resume=not no_resume,
            overwrite=overwrite,
            progress=progress,
            announce=None if json else lambda plan: note(f"This will take {plan}."),
        )
    seconds = time.monotonic() - start
    accuracy = None
    if windows is not None:
        windows.held_back(calibration, samples, seq_len, seed)
        accuracy = _judge(folder, path, windows, quiet=json)
    answer = _finish(model, folder, path, accuracy)
    answer |= {"scheme": scheme, "recipe": chosen.name, "seconds": round(seconds, 1)}
    if json:
        emit(answer)
        return
    _tell(answer)


class _Windows:
    """The text to judge on: a file's windows, or what calibration left of its own text."""

    def __init__(self, folder: Path, file: Path | None, limit: int) -> None:
        from qoq.tokenizer import Tokenizer

        self.name, self.limit, self._folder, self._file = "", limit, folder, file
        self.ids: Any = None
        self._tokenizer = Tokenizer.load(folder)

    def check(self) -> None:
        """Read a given file before the long work, not after it."""
        from qoq.cli.eval_ppl import default_seq_len
        from qoq.evaluate.texts import read_text, windows

        if self._file is None:
            return
        text = read_text(self._file)
        self.name = text.name
        self.ids = windows(text, self._tokenizer, default_seq_len(self._folder), self.limit)

    def held_back(self, calibration: str, samples: int, seq_len: int, seed: int) -> None:
        """Without a file: windows of the calibration text that calibration did not see."""
        from qoq.quantize.calibration import held_back

        if self._file is None:
            self.name = f"{Path(calibration).name} (held back)"
            self.ids = held_back(calibration, self._tokenizer, samples, seq_len, seed, self.limit)


def _recipe(name: str, scheme: "QuantScheme", without: list[str], k_rotation: bool) -> "Recipe":
    from qoq.quantize.recipe import load_recipe

    recipe = load_recipe(name, scheme)
    for pass_name in without:
        recipe = recipe.without(pass_name)
    return replace(recipe, rotate_keys=True) if k_rotation else recipe


def _judge(folder: Path, path: Path, windows: _Windows, *, quiet: bool) -> dict[str, Any] | None:
    """Perplexity of the result, beside the source where that fits in memory."""
    from qoq.evaluate.memory import fits_in_memory
    from qoq.evaluate.perplexity import Reference, evaluate
    from qoq.models.load import load_model

    if windows.ids is None:
        note("The calibration text has no windows left to judge on; give one with --eval-text.")
        return None
    reference, source_perplexity = None, None
    if fits_in_memory(folder):
        with bar("judging the original", quiet=quiet) as progress:
            source = load_model(folder)
            reference = Reference(source, windows.ids)
            source_perplexity = evaluate(source, windows.ids, progress=progress).perplexity
    elif not quiet:
        note("The original does not fit in memory: the result is judged without it.")
    with bar("judging the result", quiet=quiet) as progress:
        result = evaluate(load_model(path), windows.ids, reference, progress=progress)
    if reference is not None:
        reference.close()
    return {
        "text": windows.name,
        "windows": len(windows.ids),
        "seq_len": windows.ids.shape[1],
        "source_perplexity": source_perplexity,
        **result.to_dict(),
    }


def _finish(
    model: str, folder: Path, path: Path, accuracy: dict[str, Any] | None
) -> dict[str, Any]:
    """Write the card and the report into the finished checkpoint; return what to tell."""
    from qoq.checkpoint.files import atomic_file
    from qoq.checkpoint.hf import CONFIG_NAME, read_json_object
    from qoq.cli.inspect import lines, read_report, summary
    from qoq.evaluate.card import card
    from qoq.evaluate.page import report_page

    facts = summary(path)
    manifest = read_json_object(path / CONFIG_NAME)["quantization_config"]
    hub_id = None if Path(model).exists() else model
    notes = (f"{facts['bits_per_weight']:.2f} bits per weight of the linears, scales included.",)
    text = card(path.name, manifest, accuracy, source=folder, hub_id=hub_id, notes=notes)
    with atomic_file(path / "README.md") as file:
        file.write(text.encode())
    command = shlex.join(["qoq", *sys.argv[1:]])
    page = report_page(path.name, read_report(path), lines(facts), accuracy, command)
    with atomic_file(path / "report.html") as file:
        file.write(page.encode())
    source_bytes = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return {
        "out": str(path),
        "bytes": facts["bytes"],
        "source_bytes": source_bytes,
        "bits_per_weight": facts["bits_per_weight"],
        "report": str(path / "report.html"),
        "accuracy": accuracy,
    }


def _tell(answer: dict[str, Any]) -> None:
    print(
        f"{answer['out']}: {size(answer['bytes'])} (the original has "
        f"{size(answer['source_bytes'])}), {answer['bits_per_weight']:.2f} bits per weight, "
        f"in {duration(answer['seconds'])}"
    )
    accuracy = answer["accuracy"]
    if accuracy:
        before = accuracy["source_perplexity"]
        was = "" if before is None else f", before {before:.3f}"
        print(
            f"on {accuracy['windows']} windows of {accuracy['seq_len']} tokens of "
            f"{accuracy['text']}: perplexity {accuracy['perplexity']:.3f}{was}"
        )
        if accuracy["kl_mean"] is not None:
            print(
                f"KL from the original {accuracy['kl_mean']:.2e} nats per token (99 %: "
                f"{accuracy['kl_p99']:.2e}), same likeliest token {accuracy['top1_agreement']:.1%}"
            )
    print(f"pictures: {answer['report']}")
