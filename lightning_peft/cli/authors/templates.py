"""The files of a new method that are alike for all kinds: its card, and the project of a package of its own.

They are filled in as :class:`string.Template` does it; :mod:`lightning_peft.cli.authors.kinds` has the others.
"""

from __future__ import annotations

CARD = """\
---
goals: [$goal]
domains: [any]
needs: $needs
saves: say what it saves, or nothing
cost: not yet measured
paper: authors and year
code: none found
licence: none
---
# $name

Say in one sentence, of 60 characters, what it does.

## Sources

Authors, *title*, venue, arXiv number; official code and its licence. The code here is our own.

## Algorithm

The equations.

## Where paper and code differ

And which of the two is followed.

## Arguments

| argument | default | meaning |
| --- | --- | --- |
$arguments

## Cost

Not yet measured.

## Composes with

$composes

## Limits

What it cannot do.

## Evidence

`$test`.
"""

PROJECT = """\
[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[project]
name = "$package"
version = "0.1.0"
description = "$name for lightning_peft."
requires-python = ">=3.10"
dependencies = ["lightning-peft"]

[project.entry-points."lightning_peft.plugins"]
$name = "$module:$name"

[project.entry-points."lightning_peft.functional"]
$snake = "$functions:$snake"

[tool.hatch.build.targets.wheel]
packages = ["$package"]

[tool.pytest.ini_options]
testpaths = ["tests", "$package"]
addopts = "--doctest-modules"
"""
