"""Train a checkpoint to longer texts, in stages, on one card or several."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwen_longctx.errors import InvalidValue


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``qwen-longctx train``."""
    parser.add_argument("--model", help="folder or hub name of the checkpoint to train")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="files and folders of text, in place of the recipe's")
    parser.add_argument("--recipe", metavar="FILE", help="TOML file, or the name of one that comes along; default")
    parser.add_argument("--output", metavar="FOLDER", help="folder of the run; the same command goes on with it")
    parser.add_argument("--base-name", metavar="NAME", help="what the adapter calls its base, by default --model")
    parser.add_argument("--device", help="device to train on; by default a CUDA device where there is one")
    parser.add_argument("--show-recipe", action="store_true", help="print the recipe, and train nothing")
    parser.add_argument("--merge", metavar="ADAPTER", help="write --model with an adapter in it to --output, and stop")


def run(args: argparse.Namespace) -> None:
    """Print the recipe, add an adapter to its base, or train."""
    if args.show_recipe:
        print(_recipe_file(args.recipe).read_text(encoding="utf-8"), end="")
        return
    for name in ("output",) if args.merge else ("model", "output"):
        if getattr(args, name) is None:
            raise InvalidValue(f"--{name} is missing: name it, or print a recipe with --show-recipe")
    if args.merge is not None:
        _merge(args)
    else:
        _train(args)


def _recipe_file(name: str | None) -> Path:
    """The file of ``--recipe``: of that path, or of that name among those that come along."""
    from qwen_longctx.errors import MissingFile
    from qwen_longctx.training import stages

    if name is None:
        return stages.DEFAULT
    if Path(name).is_file():
        return Path(name)
    ours = {path.stem: path for path in stages.RECIPES.glob("*.toml")}
    if name not in ours:
        raise MissingFile(f"there is no recipe {name}: name a TOML file, or one that comes along: {', '.join(ours)}")
    return ours[name]


def _train(args: argparse.Namespace) -> None:
    import torch

    from qwen_longctx.cli import checkpoint
    from qwen_longctx.training import loop, stages
    from qwen_longctx.training.model import check_model
    from qwen_longctx.training.ranks import joined

    changed: dict[str, Any] = {} if args.data is None else {"paths": args.data}
    recipe = stages.read(_recipe_file(args.recipe), data=changed)
    config = checkpoint.load_config(args.model, any_model=True)
    check_model(config)
    tokenizer = checkpoint.load_tokenizer(args.model)
    with joined() as ranks:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and ranks.count > 1:
            device = torch.device("cuda", torch.cuda.current_device())
        name = args.base_name or args.model
        prepared = loop.prepare(config, tokenizer, recipe, args.output, name, ranks)
        if prepared.folder.finished:
            print(f"the run in {args.output} has come to its end: its result is in {prepared.folder.path / 'result'}")
            return
        model = checkpoint.load_model(argparse.Namespace(model=args.model, dtype=recipe.dtype, device_map=str(device)))
        result = loop.train(model, prepared)
    if ranks.first:
        print(f"written to {result}")


def _merge(args: argparse.Namespace) -> None:
    from qwen_longctx.cli import checkpoint
    from qwen_longctx.training import result

    folder, base = Path(args.output), args.model or result.base_of(args.merge)
    if folder.exists():
        raise InvalidValue(f"{folder} is there already: name a new folder for the checkpoint")
    checkpoint.load_config(args.merge)
    tokenizer = checkpoint.load_tokenizer(base)
    with checkpoint.reading("adapter", args.merge):
        model = result.merged(args.merge, base)
    result.write_checkpoint(model, tokenizer, folder)
    print(f"written to {folder}")
