"""Picture of results of quality, of eval, or of bench speed, decode, simulation or pipeline."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qwen_longctx.errors import InvalidValue, MissingFile, MissingPackage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``qwen-longctx plot``."""
    parser.add_argument("results", nargs="+", help="results files of one kind")
    parser.add_argument("--output", required=True, metavar="FILE", help="picture to write; its ending says the format")


def run(args: argparse.Namespace) -> None:
    """Draw the rows of all files in one picture."""
    if find_spec("matplotlib") is None:
        raise MissingPackage("plot needs matplotlib, which is not installed: pip install matplotlib")
    from matplotlib.figure import Figure

    from qwen_longctx.evaluation import plots, summary
    from qwen_longctx.files import check_writable, replacing

    check_writable(args.output)
    kind, known = Path(args.output).suffix.lstrip(".").lower(), Figure().canvas.get_supported_filetypes()
    if kind not in known:
        raise InvalidValue(f"--output must end in the format of the picture, got {args.output!r}: {', '.join(known)}")
    rows = [row for path in args.results for row in _rows(path)]
    drawings = {
        "variant": plots.quality_by_density,
        "sparse_seconds": plots.time_by_length,
        "patched_ms": plots.decoding_by_length,
        "mode": plots.figures_by_length,
        "times_from": plots.speed_by_cards,
        "busy": plots.busy_cards,
    }
    for key, drawing in drawings.items():
        if rows and all(key in row for row in rows):
            with replacing(args.output) as fresh:
                drawing(rows).savefig(fresh, dpi=100, format=kind)
            if key == "mode":
                print(summary.table(summary.summarize(rows)))
            print(f"written to {args.output}")
            return
    raise InvalidValue(
        f"{', '.join(args.results)}: give files of quality, or of bench speed, decode, simulation or pipeline with its "
        "timeline, or of eval, and of one of them only"
    )


def _rows(path: str) -> list[dict[str, Any]]:
    """The rows of one results file; none if it is of another kind."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MissingFile(f"cannot read {path}: {reason}. Give a results file (JSON) of ours") from error
    rows = content.get("rows", []) if isinstance(content, dict) else []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
