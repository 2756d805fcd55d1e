"""qoq against its peers, measured in turn on one machine: A B C A B C ..., medians of all rounds.

    python benchmarks/peers/compare.py --home ~/peers --rounds 3
    python benchmarks/peers/compare.py --home ~/peers --rounds 3 --isa avx2
    python benchmarks/peers/compare.py --home ~/peers --prompt-len 1024 --output-len 512 --batches 8
    python benchmarks/performance.py

Every measurement is a process of its own, and is saved as soon as it is there, in
benchmarks/results/peers-SHAPE-IN-OUT.json: --stop-after ends a run early, --resume goes on with
what is missing, also towards more --rounds, more --batches or more --peers.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qoq.bench.shapes import SHAPES
from qoq.evaluate.provenance import provenance

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
FIGURES = ("prefill_tok_s", "decode_tok_s", "output_tok_s", "total_tok_s", "peak_rss_bytes")
OWN = "qoq"

ISAS = ("native", "avx512vnni", "avx2")


@dataclass(frozen=True)
class System:
    """A peer as it is run: ``folder`` has its environment, ``isas`` it can be held to."""

    title: str
    folder: str
    script: str
    variant: str
    isas: tuple[str, ...] = ("native",)


PEERS = {
    "llamacpp-f16": System("llama.cpp Q4_0, f16 KV", "llamacpp", "peer_llamacpp.py", "f16", ISAS),
    "llamacpp-q4_0": System(
        "llama.cpp Q4_0, q4_0 KV", "llamacpp", "peer_llamacpp.py", "q4_0", ISAS
    ),
    "openvino": System("OpenVINO GenAI INT4 g128, u8 KV", "openvino", "peer_openvino.py", "u8"),
    "vllm": System("vLLM CPU bf16", "vllm", "peer_vllm.py", "bf16"),
    "torch": System("torch int4 g128, bf16 KV", "torch", "peer_torch.py", "bf16", ISAS),
}
DEFAULT = ("llamacpp-f16", "llamacpp-q4_0", "openvino", "vllm")


def own_command(args: argparse.Namespace, batch: int) -> list[str]:
    """`qoq bench throughput` of this environment."""
    return [
        str(Path(sys.executable).with_name("qoq")),
        *("bench", "throughput", "--shape", args.shape, "--scheme", args.scheme),
        *("--prompt-len", str(args.prompt_len), "--output-len", str(args.output_len)),
        *("--batch", str(batch), "--threads", str(args.threads), "--json"),
    ]


def peer_command(args: argparse.Namespace, system: System, batch: int) -> list[str]:
    """A peer's script in its own environment."""
    return [
        str(args.home / system.folder / ".venv" / "bin" / "python"),
        *(str(HERE / system.script), "--home", str(args.home), "--shape", args.shape),
        *("--prompt-len", str(args.prompt_len), "--output-len", str(args.output_len)),
        *("--batch", str(batch), "--threads", str(args.threads)),
        *("--variant", system.variant, "--isa", args.isa),
    ]


def measure(args: argparse.Namespace, name: str, batch: int) -> dict[str, Any]:
    """One measurement of one system: the JSON it printed."""
    own = name == OWN
    command = own_command(args, batch) if own else peer_command(args, PEERS[name], batch)
    environment = dict(os.environ)
    if own and args.isa != "native":
        environment["QOQ_ISA"] = args.isa
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = done.stdout.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("{")]
    if done.returncode or not starts:
        sys.exit(
            f"{shlex.join(command)} failed with {done.returncode}:\n{done.stderr[-2000:]}\n"
            f"benchmarks/peers/README.md says how to set up each peer; --resume goes on from here."
        )
    return dict(json.loads("\n".join(lines[starts[-1] :])))


def missing(args: argparse.Namespace, runs: list[dict[str, Any]]) -> Iterator[tuple[int, int, str]]:
    """What is still to be measured: round, batch and system, those to be compared next to each
    other in time.
    """
    done = {(run["round"], run["batch"], run["name"]) for run in runs}
    for turn in range(args.rounds):
        for batch in args.batches:
            for name in (OWN, *args.peers):
                if (turn, batch, name) not in done:
                    yield turn, batch, name


def medians(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each batch and system the median of every figure over its rounds."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["batch"], run["name"]), []).append(run)
    names = list(dict.fromkeys(run["name"] for run in runs))
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], names.index(item[0][1])))
    return [
        {
            "name": name,
            "title": OWN if name == OWN else PEERS[name].title,
            "batch": batch,
            "rounds": len(group),
            **{figure: statistics.median(run[figure] for run in group) for figure in FIGURES},
        }
        for (batch, name), group in ordered
    ]


def facts(args: argparse.Namespace, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is saved: the medians, every run, and where they come from."""
    own = [run for run in runs if run["name"] == OWN]
    arguments = ["python", "benchmarks/peers/compare.py", "--home", "PEERS", *shown(args)]
    return {
        "shape": args.shape,
        "scheme": args.scheme,
        "prompt_len": args.prompt_len,
        "output_len": args.output_len,
        "isa": own[0]["isa"] if own else args.isa,
        "threads": args.threads,
        "versions": {run["name"]: run["version"] for run in runs},
        "medians": medians(runs),
        "runs": runs,
        **provenance([]),
        "command": shlex.join(arguments),
    }


def shown(args: argparse.Namespace) -> list[str]:
    """The options that make these figures, whichever steps they were measured in."""
    return [
        *("--shape", args.shape, "--scheme", args.scheme, "--isa", args.isa),
        *("--prompt-len", str(args.prompt_len), "--output-len", str(args.output_len)),
        *("--batches", ",".join(map(str, args.batches)), "--rounds", str(args.rounds)),
        *("--peers", ",".join(args.peers), "--threads", str(args.threads)),
    ]


def known(args: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """The runs to go on from: none without --resume."""
    if not path.is_file():
        return []
    if not args.resume:
        sys.exit(f"{path} exists; go on with --resume, or remove it to start afresh.")
    saved, here = json.loads(path.read_text(encoding="utf-8")), provenance([])
    for key in ("code", "hardware"):
        if saved[key] != here[key]:
            sys.exit(f"{path} was measured with another {key}; remove it to start afresh.")
    if here["code"] is None:
        print("qoq's sources are not committed: nothing shows that they stay the same.")
    for key in ("scheme", "threads"):
        if saved[key] != getattr(args, key):
            sys.exit(f"{path} was measured with {key} {saved[key]}; give the same to go on.")
    return list(saved["runs"])


def parse() -> argparse.Namespace:
    """The command line; lists as lists, peers that exist and can be held to the isa."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, required=True, help="where install.py put the peers")
    parser.add_argument("--shape", default="llama-3.2-1b", choices=SHAPES)
    parser.add_argument("--scheme", default="w4a8kv4-g128", help="ours")
    parser.add_argument("--prompt-len", type=int, default=256, help="tokens in, each request")
    parser.add_argument("--output-len", type=int, default=32, help="tokens out, each request")
    parser.add_argument("--batches", default="1,8,32", help="requests at once, with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=None, help=f"with commas, of {', '.join(PEERS)}")
    parser.add_argument("--isa", default="native", choices=ISAS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--resume", action="store_true", help="go on from the saved runs")
    parser.add_argument(
        "--stop-after", type=float, default=None, metavar="MINUTES", help="begin nothing after that"
    )
    args = parser.parse_args()
    args.home = args.home.resolve()
    if not all(part.isdecimal() and int(part) for part in args.batches.split(",")):
        parser.error("--batches takes positive numbers with commas, such as 1,8,32.")
    args.batches = [int(part) for part in args.batches.split(",")]
    able = [name for name, system in PEERS.items() if args.isa in system.isas]
    chosen = args.peers.split(",") if args.peers else [name for name in DEFAULT if name in able]
    for name in chosen:
        if name not in able:
            parser.error(f"No peer {name!r} for --isa {args.isa}; there are {', '.join(able)}.")
    args.peers = chosen
    return args


def main() -> int:
    args = parse()
    suffix = "" if args.isa == "native" else f"-{args.isa}"
    path = RESULTS / f"peers-{args.shape}-{args.prompt_len}-{args.output_len}{suffix}.json"
    runs = known(args, path)
    start = time.monotonic()
    left = list(missing(args, runs))
    for count, (turn, batch, name) in enumerate(left):
        if args.stop_after is not None and time.monotonic() - start > 60 * args.stop_after:
            print(f"{len(left) - count} measurements left; go on with --resume.")
            return 3
        began = time.monotonic()
        run = measure(args, name, batch)
        run = {
            "round": turn,
            "name": name,
            "batch": batch,
            "version": run["version"] if name != OWN else run["qoq_version"],
            "isa": run["isa"],
            **{figure: run[figure] for figure in FIGURES},
            "wall_seconds": time.monotonic() - began,
        }
        runs.append(run)
        path.write_text(json.dumps(facts(args, runs), indent=1) + "\n", encoding="utf-8")
        print(
            f"round {turn + 1}, batch {batch:3}, {name:14} prefill {run['prefill_tok_s']:7.1f}  "
            f"decode {run['decode_tok_s']:6.1f}  total {run['total_tok_s']:7.1f} tok/s  "
            f"({run['wall_seconds']:.0f} s)",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
