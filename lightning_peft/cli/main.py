"""The `lightning-peft` command. Commands import what they need when they run, so help is quick."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lightning_peft.cli.messages import message_of, silence

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_peft.cli.console import Outcome

TAKES_OVERRIDES = ("run", "compare", "adapt", "export", "report")
READS_CHECKPOINTS = ("run", "compare", "adapt", "merge", "bake", "export", "report")


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest names where a choice was wrong."""

    as_json = False
    ending: Callable[[], str] | None = None
    """Returns the end of the help, where finding it takes time."""

    def format_help(self) -> str:
        if self.ending is not None:
            self.formatter_class, self.epilog = argparse.RawDescriptionHelpFormatter, self.ending()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        if _Parser.as_json:
            _print_failure(message, 2)
        self.exit(2, f"error: {message}\n{self.format_usage()}")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
            hint = f"Did you mean {close[0]}?" if close else f"Choose one of {', '.join(choices)}."
            raise argparse.ArgumentError(None, f"there is no command {value!r}. {hint}")


def build_parser() -> _Parser:
    """Return the parser of the whole command line."""
    from lightning_peft import __version__

    parser = _Parser(
        prog="lightning-peft",
        description="Published training methods as callbacks of Lightning: run, compare, adapt, merge, bake, export, report.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lightning-peft {__version__}")
    shared = _Parser(add_help=False)
    shared.add_argument(
        "--json", action="store_true", help="print one JSON document to standard output, all else to standard error"
    )
    shared.add_argument("--traceback", action="store_true", help="on errors, show where they come from")
    trusting = _Parser(add_help=False)
    trusting.add_argument(
        "--trusted",
        action="store_true",
        help="rebuild Python objects that a checkpoint holds, which can run any code: only for files whose source you know",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str, epilog: str | None = None) -> _Parser:
        parents = [shared, trusting] if name in READS_CHECKPOINTS else [shared]
        return commands.add_parser(name, help=text, description=text, epilog=epilog, parents=parents, allow_abbrev=False)

    listed = add("list", "list methods and recipes")
    listed.add_argument(
        "--for", dest="wishes", metavar="WISH", help='only methods that serve it: "faster inference", "vision, smaller"'
    )
    add("show", "show the card of a method").add_argument("name", metavar="METHOD")
    method = add("new", "write the files of a new method: class, function, card, test, registration")
    method.add_argument("name", metavar="NAME", help="name of the class, such as ConfidencePenalty")
    method.add_argument("--family", metavar="FOLDER", help="its family; needed in a checkout of lightning_peft")
    method.add_argument(
        "--kind", default="loss-term", help="loss-term, weight-map, layer-part, gradient or test-time (default: loss-term)"
    )
    more = "All further arguments go to LightningCLI and win over the recipe, such as --trainer.max_epochs 1 --model.lr 3e-4."
    run = add("run", "train a recipe beside its dense baseline and write a report", more)
    run.add_argument("recipe", metavar="RECIPE", help="packaged name, or path of a LightningCLI YAML file")
    run.add_argument("--out", type=Path, help="folder for everything (default: runs/RECIPE, numbered when taken)")
    run.add_argument("--no-baseline", action="store_true", help="leave out the dense baseline")
    run.add_argument(
        "--check",
        action="store_true",
        help="only try it in a few steps: build, train, validate, test, bake, load, report, export",
    )
    run.add_argument("--resume", action="store_true", help="continue a killed run from its last checkpoint")
    compare = add("compare", "train a recipe with methods left out, over seeds, and compare", more)
    compare.add_argument("recipe", metavar="RECIPE", help="packaged name, or path of a LightningCLI YAML file")
    compare.add_argument(
        "--without", nargs="+", action="append", default=[], metavar="METHOD", help="a variant without these; may be repeated"
    )
    compare.add_argument("--each", action="store_true", help="one variant for every method, without it")
    compare.add_argument("--dense", action="store_true", help="a variant without any method")
    compare.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default: 3)")
    compare.add_argument(
        "--out", type=Path, help="folder; trainings finished there are not repeated (default: runs/compare/RECIPE)"
    )
    adapt = add("adapt", "compare a recipe's test-time methods under distribution shift", more)
    adapt.add_argument("recipe", metavar="RECIPE", help="packaged name, or path of a LightningCLI YAML file")
    adapt.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help="methods of the recipe (default: all)")
    adapt.add_argument("--shifts", nargs="+", default=[], metavar="SHIFT", help="shifts of the data (default: all)")
    adapt.add_argument(
        "--severities", nargs="+", type=int, default=[], metavar="S", help="severities of the shifts (default: the highest)"
    )
    adapt.add_argument(
        "--protocols",
        nargs="+",
        default=["continual"],
        metavar="PROTOCOL",
        help="reset, continual, mixed, gradual, correlated (default: continual)",
    )
    adapt.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 of the streams (default: 3)")
    adapt.add_argument("--clean", type=int, metavar="N", help="clean samples at the end of each stream (default: all)")
    adapt.add_argument("--checkpoint", type=Path, metavar="CKPT", help="source model (default: trained by the recipe)")
    adapt.add_argument("--out", type=Path, help="folder; episodes finished there are not repeated (default: runs/adapt/RECIPE)")
    _add_merge(add("merge", "merge models that were trained from one start into one"))
    bake = add("bake", "turn a checkpoint into one of an ordinary module")
    bake.add_argument("checkpoint", type=Path, metavar="CKPT")
    bake.add_argument("-o", "--out", type=Path, help="file to write (default: beside it, NAME.baked.ckpt)")
    report = add("report", "report on a checkpoint, from the file alone")
    report.add_argument("checkpoint", type=Path, metavar="CKPT")
    report.add_argument("-o", "--out", type=Path, help="folder to write (default: beside it, NAME-report)")
    report.add_argument("--before", type=Path, metavar="CKPT", help="measure it beside this one: FLOPs, latency, accuracy")
    report.add_argument("--recipe", help="recipe both were trained with; --before needs its model and test data")
    report.add_argument("--device", default="cpu", help="where --before measures (default: cpu)")
    export = add("export", "write a checkpoint's baked network as safetensors, ONNX or a torch.export program", more)
    export.add_argument("checkpoint", type=Path, metavar="CKPT")
    export.add_argument("--to", choices=["safetensors", "onnx", "exported"], required=True, help="what to write")
    export.add_argument("--recipe", help="recipe it was trained with; onnx and exported need its model and a test batch")
    export.add_argument("-o", "--out", type=Path, help="file or folder to write (default: beside it)")
    assets = add("assets", "list or fetch the data and weights recipes use")
    assets.add_argument("action", nargs="?", choices=["fetch"], help="fetch instead of list")
    assets.add_argument("names", nargs="*", metavar="NAME")
    assets.add_argument("--all", action="store_true", help="fetch all")
    return parser


def _add_merge(merge: _Parser) -> None:
    def methods() -> str:
        from lightning_peft.cli.merge import methods_help

        return methods_help()

    merge.ending = methods
    merge.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        type=Path,
        help="checkpoints, state dicts, safetensors, folders of Hugging Face or PEFT; or one configuration of mergekit",
    )
    merge.add_argument("--method", metavar="NAME", help="how, see below (default: soup)")
    merge.add_argument("--base", type=Path, metavar="MODEL", help="model that all were trained from")
    merge.add_argument(
        "--fisher", nargs="+", type=Path, metavar="FILE", help="Fisher information of each model, for the method fisher"
    )
    merge.add_argument("--weights", nargs="+", type=float, metavar="W", help="how much each model counts (default: all alike)")
    merge.add_argument(
        "--scale",
        nargs="+",
        type=float,
        metavar="S",
        help="factor of the merged difference; two grow from the first block to the last",
    )
    merge.add_argument("--per-tensor", action="store_true", help="find thresholds for each tensor, not for a model as a whole")
    merge.add_argument(
        "--dtype", metavar="TYPE", help="type of the result: float32, bfloat16, float16, float64 (default: the base's)"
    )
    merge.add_argument("--seed", type=int, default=0, metavar="N", help="seed of methods that drop at random (default: 0)")
    merge.add_argument(
        "--option", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of the method, such as density=0.3"
    )
    merge.add_argument(
        "-o",
        "--out",
        type=Path,
        help=".ckpt, .pt or .safetensors, or a folder (default: merged, beside the first model and of its kind)",
    )


def dispatch(options: argparse.Namespace, overrides: Sequence[str], console: Console) -> Outcome:
    """Run the command that was parsed."""
    if options.command in ("list", "show"):
        from lightning_peft.cli import listing

        if options.command == "show":
            return listing.show_method(options.name)
        return listing.list_all() if options.wishes is None else listing.list_for(options.wishes)
    if options.command == "new":
        from lightning_peft.cli.authors.new import new

        return new(options.name, options.family, Path.cwd(), options.kind)
    if options.command in READS_CHECKPOINTS:
        _let_import(getattr(options, "recipe", None))
    if options.command == "merge":
        from lightning_peft.cli.merge import merge

        return merge(options, console)
    if options.command == "run":
        from lightning_peft.cli.run import check, run

        settings = {"baseline": not options.no_baseline, "trusted": options.trusted}
        if options.check:
            return check(options.recipe, overrides, console, **settings)
        return run(options.recipe, overrides, options.out, console, resume=options.resume, **settings)
    if options.command == "compare":
        from lightning_peft.cli.compare import compare

        chosen = {
            "each": options.each,
            "dense": options.dense,
            "seeds": options.seeds,
            "out": options.out,
            "trusted": options.trusted,
        }
        return compare(options.recipe, overrides, options.without, console, **chosen)
    if options.command == "adapt":
        from lightning_peft.cli.adapt import Choice, adapt

        picked = Choice(options.methods, options.shifts, options.severities, options.protocols, options.seeds, options.clean)
        files = {"out": options.out, "checkpoint": options.checkpoint, "trusted": options.trusted}
        return adapt(options.recipe, overrides, picked, console, **files)
    return _dispatch_files(options, overrides)


def _let_import(recipe: str | None) -> None:
    """Let a recipe, or a checkpoint's objects, name classes of the folder the command is given in, and of the recipe's own."""
    folders = [Path.cwd()]
    if recipe is not None and Path(recipe).suffix in (".yaml", ".yml") and Path(recipe).is_file():
        folders.append(Path(recipe).resolve().parent)
    sys.path += [str(folder) for folder in folders if str(folder) not in sys.path]


def _dispatch_files(options: argparse.Namespace, overrides: Sequence[str]) -> Outcome:
    """Run a command about files."""
    if options.command == "export" or (options.command == "report" and options.before is not None):
        from lightning_peft.cli import export

        if options.command == "export":
            return export.export(
                options.checkpoint, options.to, options.out, options.recipe, overrides, trusted=options.trusted
            )
        where = {"out": options.out, "device": options.device, "trusted": options.trusted}
        return export.deployment(options.checkpoint, options.before, options.recipe, overrides, **where)
    from lightning_peft.cli import file_commands as files

    if options.command == "report" and options.recipe is not None:
        from lightning_peft.cli.recipes import UsageError

        raise UsageError("--recipe is for --before CKPT: a report on one checkpoint reads the file alone.")
    if options.command == "bake":
        return files.bake(options.checkpoint, options.out, trusted=options.trusted)
    if options.command == "report":
        return files.report(options.checkpoint, options.out, trusted=options.trusted)
    if options.action == "fetch":
        return files.fetch_assets(options.names, everything=options.all)
    return files.list_assets()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; by default those of the process.

    Returns:
        Exit code: 0 done, 2 an error that is explained in one message, 130 interrupted.
    """
    parser = build_parser()
    _Parser.as_json = "--json" in (sys.argv[1:] if argv is None else argv)
    options, overrides = parser.parse_known_args(argv)
    if overrides and (options.command not in TAKES_OVERRIDES or not getattr(options, "recipe", None)):
        parser.error(f"{options.command} does not know {' '.join(overrides)}")
    from rich.console import Console

    from lightning_peft.cli.interrupts import sigterm_interrupts

    # In JSON mode standard output carries the document and nothing else, whatever a library prints.
    quiet = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
    with quiet, warnings.catch_warnings(), sigterm_interrupts():
        silence()
        console = Console()
        status = 0
        try:
            outcome = dispatch(options, overrides, console)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            status, message = _failure(error, options)
            if status == 0:  # an argument such as --print_config, which prints and ends
                return 0
    if status:
        print(message, file=sys.stderr)
        if options.json:
            _print_failure(message, status)
        return status
    try:
        if options.json:
            from lightning_peft.report.report import to_json

            print(to_json(outcome.data))
        else:
            outcome.show(console)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _failure(error: BaseException, options: argparse.Namespace) -> tuple[int, str]:
    """Return exit code and message of a command that did not come to its end."""
    if isinstance(error, KeyboardInterrupt):
        return 130, f"interrupted. {error}".strip()
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        return status, f"error: ended early, with exit code {error.code}"
    if options.traceback:
        traceback.print_exc()
    assert isinstance(error, Exception)
    return 2, f"error: {message_of(error)}"


def _print_failure(message: str, status: int) -> None:
    """Print the one JSON document of a command that failed."""
    import json

    print(json.dumps({"error": message.removeprefix("error: "), "exit_code": status}, indent=2))


if __name__ == "__main__":
    sys.exit(main())
