"""The head of a method's card: purpose, needs and costs, in fields that can be searched and put into tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

GOALS = {
    "smaller": "zeros for sparse hardware and small files, or fewer weights.",
    "faster inference": "smaller layers, fewer layers, or only the work an input needs.",
    "better accuracy": "higher accuracy or better calibration, without a second network.",
    "cheaper training": "fewer FLOPs, or fewer weights that train.",
    "bigger without restart": "begin small, end as built, in one fit.",
    "robust at test time": "adapt a trained network to the data it meets, in `trainer.test`, `predict` and `validate`.",
}
DOMAINS = ("any", "vision", "language")


@dataclass(frozen=True)
class CardHead:
    """The fields of a card's head.

    Attributes:
        goals: What a user wants it for, the main goal first; keys of :data:`GOALS`.
        domains: Kinds of data it is for, of :data:`DOMAINS`.
        needs: What the network must be or have.
        saves: What its user saves.
        cost: What it costs in training or at test time.
        paper: Authors and year, as tables show them.
        code: Official code.
        licence: Licence of the official code.
    """

    goals: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    needs: str = ""
    saves: str = ""
    cost: str = ""
    paper: str = ""
    code: str = ""
    licence: str = ""

    def serves(self, wishes: str, summary: str = "") -> bool:
        """Whether every wish is met: wishes are separated by commas; each is a goal, a domain, or words of the head.

        Example:
            >>> CardHead(goals=("smaller",), domains=("any",)).serves("vision, smaller")
            True
        """
        text = " ".join([*map(str, asdict(self).values()), summary]).lower()
        return all(self._serves(wish, text) for wish in _phrases(wishes))

    def _serves(self, wish: str, text: str) -> bool:
        if wish in GOALS:
            return wish in self.goals
        if wish in DOMAINS:
            return wish in self.domains or "any" in self.domains
        return all(word in text for word in wish.split())


def _phrases(wishes: str) -> list[str]:
    return [" ".join(wish.lower().split()) for wish in wishes.split(",") if wish.strip()]


def split_head(card: str) -> tuple[str, str]:
    r"""Return the head of a card, without the lines around it, and what follows; no head is an empty one.

    Example:
        >>> split_head("---\ncost: none\n---\n# Tent\n")
        ('cost: none\n', '# Tent\n')
        >>> split_head("# Tent\n")
        ('', '# Tent\n')
    """
    if not card.startswith("---\n"):
        return "", card
    head, line, body = card[4:].partition("---\n")
    return (head, body) if line else ("", card)


def parse_head(head: str) -> CardHead:
    """Read the head of a card.

    Raises:
        ValueError: It is not YAML, has an unknown field, goal or domain, or a value of the wrong kind.
    """
    import yaml

    try:
        fields: Any = yaml.safe_load(head) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise ValueError("not a mapping of fields")
    known = CardHead.__dataclass_fields__
    if unknown := [str(field) for field in fields if field not in known]:
        raise ValueError(f"unknown fields {', '.join(unknown)}; the fields are {', '.join(known)}")
    listed = {"goals": tuple(GOALS), "domains": DOMAINS}
    for field, value in fields.items():
        if field in listed and not (isinstance(value, list) and set(map(str, value)) <= set(listed[field])):
            raise ValueError(f"{field} must be a list of {', '.join(listed[field])}, not {value!r}")
        if field not in listed and not isinstance(value, str):
            raise ValueError(f"{field} must be text, not {value!r}")
    values: dict[str, Any] = {field: tuple(value) if field in listed else value for field, value in fields.items()}
    return CardHead(**values)
