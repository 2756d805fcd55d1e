"""``qoq bench crossover``: our linear against torch's, from one row to many."""

from pathlib import Path
from typing import Annotated

import typer

from qoq.cli.bench import SHAPE, need_kernels, numbers, origin, what_runs
from qoq.cli.options import JSON, THREADS, use_threads
from qoq.cli.terminal import bar, emit, verb


@verb()
def crossover(
    shape: SHAPE = "llama-3-8b",
    linear: Annotated[
        str, typer.Option(help="Which linear: qkv_proj, o_proj, gate_up_proj or down_proj.")
    ] = "gate_up_proj",
    rows: Annotated[
        str, typer.Option(help="Numbers of rows M, with commas.")
    ] = "1,2,4,8,16,32,64,128,256,512",
    picture: Annotated[
        Path | None, typer.Option(help="Draw speed over M into this .svg or .png file.")
    ] = None,
    threads: THREADS = None,
    json: JSON = False,
) -> None:
    """Time one linear at growing numbers of rows against torch's bf16 and int8 products.

    Systems take turns, and weights come from memory as they do in a model. Ours start from int8
    rows and end in fp32; torch's int8 ends in bare int32 sums, without scales.

        qoq bench crossover --shape llama-3.2-1b --picture crossover.svg

    --json prints: shape, linear, isa, threads, points (each with system, M, seconds), command,
    commit, hardware.
    """
    import torch

    from qoq.bench.crossover import BASELINE, Point
    from qoq.bench.crossover import crossover as measure
    from qoq.bench.crossover import picture as draw
    from qoq.bench.shapes import config_of

    need_kernels()
    use_threads(threads)
    config, sizes, runs = config_of(shape, 1), numbers(rows, "--rows"), what_runs()
    torch.set_num_threads(runs["threads"])
    points: list[Point] = []
    with bar("crossover", quiet=json) as progress:
        for point in measure(config, linear, sizes):
            points.append(point)
            progress(len(points), 4 * len(sizes), f"{point.system}, M {point.M}")
    if picture is not None:
        draw(points, f"{linear} of {shape}, {runs['isa']}, {runs['threads']} threads", picture)
    if json:
        facts = {"shape": shape, "linear": linear, **runs}
        emit({**facts, "points": [point.to_dict() for point in points], **origin()})
        return
    base = {point.M: point.seconds for point in points if point.system == BASELINE}
    for point in points:
        print(
            f"M {point.M:5}  {point.system:12} {point.seconds * 1e3:10.3f} ms "
            f"{base[point.M] / point.seconds:6.2f}x {BASELINE}"
        )
