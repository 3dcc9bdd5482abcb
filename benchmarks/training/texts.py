"""Fetch the texts that the adapters in benchmarks/adapters were trained on.

    python benchmarks/training/texts.py FOLDER

They are the sources and the documentation of five packages in fixed versions, whose licences allow it (BSD, MIT and, of
Ansible, GPL 3). No text of them is in an evaluation task. A folder for the code and one for the documentation of each
package makes two long documents of related files.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

PACKAGES = ("django==5.2.19", "sphinx==9.0.4", "twisted==26.10.0", "networkx==3.6.1", "ansible-core==2.19.14")
_PROSE = (".rst", ".txt", ".md")


def part(name: PurePosixPath) -> str | None:
    """Whether a file of a source archive is of the code, of the documentation, or of neither."""
    folders = name.parts[1:-1]
    if any(folder in ("test", "tests") for folder in folders):
        return None
    if any(folder.startswith("doc") for folder in folders):
        return "documentation" if name.suffix in _PROSE else None
    return "code" if name.suffix == ".py" else None


def texts(archive: Path) -> Iterator[tuple[str, PurePosixPath, bytes]]:
    """Part, name without the archive's own folder, and content of each text."""
    with tarfile.open(archive) as opened:
        for member in opened:
            name = PurePosixPath(member.name)
            kind, file = part(name), opened.extractfile(member)
            if kind is not None and file is not None and member.size:
                yield kind, PurePosixPath(*name.parts[1:]), file.read()


def main(arguments: Sequence[str] | None = None) -> None:
    """Download, and write the texts to a new folder."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="new folder for the texts")
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as downloads:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", downloads, *PACKAGES], check=True)
        for archive in sorted(Path(downloads).iterdir()):
            package = archive.name.rsplit("-", 1)[0]
            for kind, name, content in texts(archive):
                path = folder / f"{package}-{kind}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


if __name__ == "__main__":
    main()
