"""Pack vLLM for a GPU machine without a package index, in two parts of at most 50 MB.

    python benchmarks/vllm/pack.py FOLDER            # about 5 minutes, 350 MB of downloads
    python benchmarks/vllm/pack.py FOLDER --wheels DOWNLOADED

The parts hold what a Qwen without experts needs on a GPU of compute capability 9.0 (Hopper), beside CPython 3.12, torch
2.11 for CUDA 13 and transformers: vLLM's Python files, its compiled operations, FlashAttention 3, and the packages that
such an image lacks. FlashAttention 2, kernels for experts and vLLM's front end in Rust stay behind; vLLM does without.
There:

    mkdir SITE && cat vllm.tar.xz.0 vllm.tar.xz.1 | tar -xJ -C SITE
    export PYTHONPATH=SITE VLLM_USE_FLASHINFER_SAMPLER=0
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

VLLM = "vllm==0.26.0"
# what vLLM imports for text models and its server, and PyTorch's images lack
OTHERS = """
annotated-types==0.8.0 apache-tvm-ffi==0.1.15.post2 astor==0.8.1 blake3==1.0.11 cachetools==8.0.2 cbor2==6.3.0
compressed-tensors==0.17.0 depyf==0.20.0 dill==0.4.1 dnspython==2.9.2 email-validator==2.4.0 fastapi==0.136.3
httpcore2==2.16.2 httptools==0.9.0 httpx2==2.16.2 ijson==3.6.0 interegular==0.3.3 jiter==0.19.0 jmespath==1.1.0
jsonschema==4.26.0 jsonschema-specifications==2025.9.1 lark==1.2.2 llguidance==1.7.6 lm-format-enforcer==0.11.3
loguru==0.7.3 mistral_common==1.13.1 model-hosting-container-standards==0.1.16 msgspec==0.23.0 openai==3.57.0
openai-harmony==0.0.8 opentelemetry-api==1.45.2 opentelemetry-sdk==1.45.2 opentelemetry-semantic-conventions==0.66b2
outlines_core==0.2.14 partial-json-parser==0.2.1.1.post7 prometheus-fastapi-instrumentator==8.1.0 pybase64==1.5.1
pycountry==26.2.16 pydantic==2.14.4 pydantic-extra-types==2.11.1 pydantic-settings==2.16.3 pydantic_core==2.50.5
python-dotenv==1.2.4 python-json-logger==4.2.0 python-multipart==0.0.34 pyzmq==27.3.0 referencing==0.37.0
rpds-py==2026.9.1 setproctitle==1.3.8 sniffio==1.3.1 starlette==1.10.0 supervisor==4.3.0 truststore==0.10.5
typing-inspection==0.4.5 uvicorn==0.54.0 watchfiles==1.3.0 websockets==17.4 xgrammar==0.2.8
""".split()
PYTHON = "3.12"
GLIBC = 39  # of the machine: pip matches the numbers of platforms exactly
NAME = "vllm.tar.xz"
LARGEST = 50_000_000  # bytes of a part

_LIBRARIES = (  # of vLLM: others are for models and devices that are not measured
    "vllm/_C_stable_libtorch.abi3.so",
    "vllm/_rust_tool_parser.abi3.so",
    "vllm/cumem_allocator.abi3.so",
    "vllm/fs_io_C.abi3.so",
    "vllm/spinloop.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
)
_LEFT = (  # sources of kernels, pictures of the documentation, translations and tokenizers of other models
    r"\.(h|hpp|cuh|cu|cpp|inl|mo|po|pyi|js|css|map)$",
    r"^(mistral_common/data|pycountry/locales)/",
    r"/tests?/",
    r"^vllm/(benchmarks|third_party/(deep_gemm|fmha_sm100|triton_kernels))/",
)


def wanted(name: str) -> bool:
    """Whether a file of a wheel is packed."""
    if name.startswith("vllm/") and (".so" in name or name == "vllm/vllm-rs"):
        return name in _LIBRARIES
    return not name.endswith("/") and not any(re.search(pattern, name) for pattern in _LEFT)


def download(requirements: Sequence[str], folder: Path) -> None:
    """Fetch wheels for the machine, without what they depend on."""
    platforms = [f"manylinux_2_{number}_x86_64" for number in range(GLIBC, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", "-d", str(folder)]
    command += [word for platform in platforms for word in ("--platform", platform)]
    subprocess.run([*command, *requirements], check=True)


def pack(wheels: Sequence[Path], target: Path) -> int:
    """Write what is wanted of all wheels into one compressed archive, and return its bytes, compressed.

    Raises
    ------
    ValueError
        Two wheels hold the same file.
    """
    seen: dict[str, Path] = {}
    with tarfile.open(target, "w:xz", preset=6) as archive:
        for wheel, name, member in sorted(_members(wheels), key=lambda one: (Path(one[1]).suffix, one[1])):
            if name in seen:
                raise ValueError(f"{wheel.name} and {seen[name].name} both hold {name}: pack one of them")
            seen[name] = wheel
            with zipfile.ZipFile(wheel) as source, source.open(member) as content:
                info = tarfile.TarInfo(name)
                info.size, info.mode = member.file_size, 0o755 if ".so" in name else 0o644
                archive.addfile(info, content)
    return target.stat().st_size


def _members(wheels: Sequence[Path]) -> Iterator[tuple[Path, str, zipfile.ZipInfo]]:
    """Wheel, place after installation, and entry of every file that is wanted."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as source:
            for member in source.infolist():
                # what a wheel says is for the folder of packages
                name = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", member.filename)
                if ".data/" not in name and wanted(name):
                    yield wheel, name, member


def split(source: Path, largest: int = LARGEST) -> list[Path]:
    """Cut a file into as many parts of equal size as needed beside it, and remove it."""
    size = source.stat().st_size
    count = -(-size // largest)
    parts = []
    with source.open("rb") as content:
        for number in range(count):
            part = source.with_name(f"{source.name}.{number}")
            part.write_bytes(content.read(-(-size // count)))
            parts.append(part)
    source.unlink()
    return parts


def main(arguments: Sequence[str] | None = None) -> None:
    """Download, pack, split, and print the parts."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the parts are written")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that were downloaded before")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        wheels = options.wheels
        if wheels is None:
            wheels = Path(temporary)
            download([VLLM, *OTHERS], wheels)
        found = sorted(wheels.glob("*.whl"))
        if not found:
            parser.error(f"there are no wheels in {wheels}: leave --wheels out to download them")
        target = options.folder / NAME
        pack(found, target)
    for part in split(target):
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        print(f"{part}  {part.stat().st_size:,} bytes  sha256 {digest}")


if __name__ == "__main__":
    main()
