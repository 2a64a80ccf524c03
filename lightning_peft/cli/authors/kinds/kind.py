"""The texts of one kind of method."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """The texts of one kind of method, in which ``$name``, ``$snake`` and others are filled in.

    Attributes:
        name: What ``--kind`` calls it.
        goal: Goal in the head of its card.
        needs: Demand on the network in the head of its card.
        method: The file with the class.
        functions: The file with its mathematics.
        test: Its test.
        tools: Names that the test imports from :mod:`lightning_peft.testing`.
        arguments: Rows of the card's table of arguments.
        composes: Sentence of its card about other methods.
        classes: Names that the test imports from the file with the class.
    """

    name: str
    goal: str
    needs: str
    method: str
    functions: str
    test: str
    tools: str
    arguments: str
    composes: str
    classes: tuple[str, ...] = ("$name",)
