"""From a recipe to a Trainer, a module and data: LightningCLI as it is, with the methods left out on request."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_peft.cli.classes import class_name, is_method
from lightning_peft.cli.explain import as_usage_errors
from lightning_peft.cli.overrides import apply_named, split_named
from lightning_peft.cli.recipes import Recipe, check_extras

Adjust = Callable[[dict[str, Any]], None]


class RecipeCLI(LightningCLI):
    """LightningCLI on a list of arguments, which can leave methods out and adjust what the Trainer is given.

    Args:
        args: As on LightningCLI's own command line.
        without: Class names of methods to leave out.
        adjust: Called with the Trainer's arguments, callbacks instantiated, before it is built.
    """

    model: LightningModule
    datamodule: LightningDataModule | None
    trainer: Trainer

    def __init__(self, args: Sequence[str], without: Sequence[str] = (), adjust: Adjust | None = None) -> None:
        self.without = frozenset(without)
        self.adjust = adjust
        super().__init__(
            save_config_callback=None,
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False},
            args=list(args),
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, without the parent's warning about the arguments this process was started with, and set what is named."""
        known = {action.dest.split(".")[0] for action in parser._actions}
        own, named = split_named(cast(list[str], args), known)
        self.config = parser.parse_args(own)
        apply_named(named, self.entries())

    def before_instantiate_classes(self) -> None:
        """Leave methods out before they are built."""
        if not self.without:
            return
        self.config.trainer.callbacks = [entry for entry in self.entries() if class_name(entry) not in self.without]

    def entries(self) -> list[Namespace]:
        """Return the parsed callbacks."""
        callbacks = self.config.trainer.callbacks or []
        return callbacks if isinstance(callbacks, list) else [callbacks]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer after :attr:`adjust` has seen its arguments."""
        arguments: dict[str, Any] = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        callbacks = arguments.get("callbacks") or []
        arguments["callbacks"] = [*callbacks] if isinstance(callbacks, list) else [callbacks]
        if self.adjust is not None:
            self.adjust(arguments)
        return self._instantiate_trainer(arguments, [])


def quiet_lightning() -> None:
    """Leave out Lightning's announcements of seeds and devices; warnings stay."""
    for part in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{part}").setLevel(logging.WARNING)


@contextlib.contextmanager
def interruptible(trainer: Trainer) -> Iterator[None]:
    """Turn the ways in which Lightning ends an interrupted fit or test into one.

    Raises:
        KeyboardInterrupt: The user stopped the Trainer.
    """
    try:
        yield
    except SystemExit:  # how Lightning ends a process that was interrupted
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    if trainer.interrupted:
        raise KeyboardInterrupt


def launch(recipe: Recipe, overrides: Sequence[str], without: Sequence[str] = (), adjust: Adjust | None = None) -> RecipeCLI:
    """Build everything a recipe describes.

    Args:
        recipe: The recipe.
        overrides: Further LightningCLI arguments, which win over the file.
        without: Class names of methods to leave out.
        adjust: See :class:`RecipeCLI`.

    Raises:
        UsageError: An extra is missing, or LightningCLI refuses the file or an override.
    """
    check_extras(recipe)
    with as_usage_errors(recipe):
        return RecipeCLI(["--config", str(recipe.path), *overrides], without, adjust)


def parse(recipe: Recipe, overrides: Sequence[str], without: Sequence[str] = ()) -> RecipeCLI:
    """Parse what :func:`launch` would, without building or seeding anything; arguments as there."""
    check_extras(recipe)
    with as_usage_errors(recipe):
        return _ParseOnly(["--config", str(recipe.path), *overrides], without)


def methods_in(recipe: Recipe, overrides: Sequence[str]) -> list[str]:
    """Return the class names of the methods a recipe uses, after overrides.

    Raises:
        UsageError: As :func:`launch`.
    """
    callbacks = parse(recipe, overrides).config.trainer.callbacks or []
    names = [class_name(entry) for entry in (callbacks if isinstance(callbacks, list) else [callbacks])]
    return [name for name in names if is_method(name)]


class _ParseOnly(RecipeCLI):
    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass
