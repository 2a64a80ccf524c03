from __future__ import annotations

import pytest

from lightning_peft.atomic_files import whole


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    with whole(path) as part:
        part.write_text("first")
        assert not path.exists()
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a.json", "first")]
    with pytest.raises(KeyboardInterrupt), whole(path) as part:  # noqa: PT012 - interrupted after a write
        part.write_text("sec")
        raise KeyboardInterrupt
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a.json", "first")]
    with whole(path) as part:
        part.write_text("third")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a.json", "third")]
