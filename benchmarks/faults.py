"""Plants small faults in the code, one at a time, and reports how many the tests notice.

    python benchmarks/faults.py                  # all of them, some twenty minutes
    python benchmarks/faults.py E03 P22          # some of them
    python benchmarks/faults.py --list

Each fault replaces a piece of one file, in a copy of the working tree, and runs the test files that should notice. A fault that
no test notices is printed with the tests that passed. What is planted, and where, stands in ``faults.yaml``; a test asks that
every entry still fits the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks" / "faults.yaml"
PACKAGES = (".", "plugins", "recipes")


@dataclass(frozen=True)
class Fault:
    """A fault to plant.

    Attributes:
        name: A short key and what goes wrong.
        file: The file, from the root of the repository.
        code: What stands there.
        fault: What is put in its place.
        tests: Test files that should notice, in one string; names after ``-k`` select among them.
    """

    name: str
    file: str
    code: str
    fault: str
    tests: str

    def planted(self, root: Path) -> str:
        """Return the file's text with the fault.

        Raises:
            LookupError: The code does not stand there exactly once.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        if text.count(self.code) != 1:
            raise LookupError(f"{self.name}: {self.file} holds {self.code!r} {text.count(self.code)} times, not once")
        return text.replace(self.code, self.fault)


def faults() -> list[Fault]:
    """Read the table."""
    return [Fault(name, **entry) for name, entry in yaml.safe_load(TABLE.read_text(encoding="utf-8")).items()]


def copy_of_the_tree(folder: Path) -> Path:
    """Copy all files git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def notices(fault: Fault, root: Path, *, plant: bool = True) -> bool:
    """Plant a fault, run its tests in a fork of this process, and take it out again.

    Raises:
        RuntimeError: The tests did not run, so that they say nothing.
    """
    path = root / fault.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(fault.planted(root) if plant else whole, encoding="utf-8")
    try:
        child = os.fork()
        if not child:
            _run(root, fault.tests.split())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        path.write_text(whole, encoding="utf-8")
    if code > 2:  # 0: all passed; 1: a test failed; 2: the fault cannot be imported
        raise RuntimeError(f"{fault.name}: pytest ended with {code} on {fault.tests}")
    return code != 0


def _run(root: Path, tests: list[str]) -> None:
    """Run tests in a copy and leave with their status; torch and Lightning are imported already."""
    code = 1
    try:
        import pytest

        os.chdir(root)
        sys.dont_write_bytecode = True
        sys.path[:0] = [str(root / package) for package in PACKAGES]
        os.environ["PYTHONPATH"] = os.pathsep.join(str(root / package) for package in PACKAGES)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        rewritten = "ignore::pytest.PytestAssertRewriteWarning"  # what is imported already keeps its plain assertions
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", rewritten, *tests]))
    finally:
        os._exit(code)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="first words of the faults to plant")
    parser.add_argument("--list", action="store_true", help="only list them")
    parser.add_argument("--control", action="store_true", help="plant nothing: no test may fail")
    arguments = parser.parse_args()
    chosen = [f for f in faults() if not arguments.names or f.name.split()[0] in arguments.names]
    if arguments.list:
        print("\n".join(fault.name for fault in chosen))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import lightning.pytorch
    import torch  # noqa: F401 - children are forked with it loaded
    import torchmetrics.classification  # noqa: F401 - the same

    assert lightning.pytorch is not None
    lived = []
    with tempfile.TemporaryDirectory() as folder:
        root = copy_of_the_tree(Path(folder))
        for fault in chosen:
            start = time.monotonic()
            noticed = notices(fault, root, plant=not arguments.control)
            print(f"{'noticed' if noticed else 'LIVES':8} {time.monotonic() - start:5.0f} s  {fault.name}", flush=True)
            if not noticed:
                lived.append(fault)
    for fault in lived:
        print(f"\n{fault.name}\n  {fault.file}: {fault.code!r} -> {fault.fault!r}\n  passed: {fault.tests}")
    share = 1 - len(lived) / max(1, len(chosen))
    print(f"\n{len(chosen) - len(lived)} of {len(chosen)} noticed ({100 * share:.0f} %)")


if __name__ == "__main__":
    main()
