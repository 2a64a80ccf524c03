from __future__ import annotations

from pathlib import Path

import pytest

from lightning_peft.cli.folders import check_settings, held, try_hold
from lightning_peft.cli.recipes import UsageError

THEN = "# made with torch 2\nseed: 1\nepochs: 3\n"


def test_a_folder_is_held_by_one_and_given_back(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    for _ in range(2):
        with held(folder) as found:
            assert found == folder
            assert try_hold(folder) is None
            with pytest.raises(UsageError, match="Another command is working in"), held(folder):
                pass
    with pytest.raises(ZeroDivisionError), held(folder):
        raise ZeroDivisionError
    lock = try_hold(folder)
    assert lock is not None
    lock.release()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be written: .*--out"):
        try_hold(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("now", "changed"),
    [(THEN.replace("3", "4"), "changed are: epochs: 4"), (THEN.replace("epochs: 3\n", ""), "changed are: lines left out")],
)
def test_a_run_goes_on_with_the_settings_it_had(now: str, changed: str, tmp_path: Path) -> None:
    check_settings(tmp_path / "run", THEN, kept=False)
    check_settings(tmp_path / "run", THEN, kept=True)
    with pytest.raises(UsageError, match=changed):
        check_settings(tmp_path / "run", now, kept=True)
    check_settings(tmp_path / "run", now, kept=False)  # nothing is there to go on with
    check_settings(tmp_path / "run", now, kept=True)
