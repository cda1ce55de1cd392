import errno
import io
import zipfile

import pytest
import torch

from ndeflow.training import files
from ndeflow.training.files import CheckpointError, DiskFull, NoCheckpoint


def checkpoint(step=1, **extra):
    return {"ndeflow": {"format": files.FORMAT, "config": {}}, "global_step": step, "w": torch.arange(1000.0), **extra}


def test_what_is_written_is_read_with_weights_only(tmp_path):
    files.write(checkpoint(), tmp_path / "ckpt" / "a.ckpt")
    assert torch.equal(files.read(tmp_path / "ckpt" / "a.ckpt")["w"], torch.arange(1000.0))
    assert [p.name for p in (tmp_path / "ckpt").iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_damage_is_found_and_the_file_before_is_used(tmp_path, damage):
    files.write(checkpoint(1), tmp_path / files.step_name(1))
    files.write(checkpoint(2), tmp_path / files.step_name(2))
    path = tmp_path / files.step_name(2)
    data = bytearray(path.read_bytes())
    if damage == "flipped":  # one bit of the weights: torch.load returns other numbers without a word
        with zipfile.ZipFile(path) as archive:
            info = next(i for i in archive.infolist() if i.file_size == 4000)
        data[info.header_offset + 2000] ^= 1
        path.write_bytes(data)
        assert not torch.equal(torch.load(path, weights_only=True)["w"], torch.arange(1000.0))
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    with pytest.raises(CheckpointError, match="is unreadable"):
        files.read(path)
    with pytest.warns(UserWarning, match="unreadable .*; trying the one before"):
        found = files.latest(tmp_path, retire=True)
    assert found is not None
    assert found[0].name == files.step_name(1)
    assert path.with_suffix(".ckpt.bad").is_file()
    assert not path.exists()


@pytest.mark.filterwarnings("ignore:.*trying the one before")
def test_all_damaged_is_an_error_and_none_is_none(tmp_path):
    assert files.latest(tmp_path) is None
    (tmp_path / files.step_name(3)).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        files.latest(tmp_path)


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    files.write(checkpoint(1), tmp_path / files.step_name(1))

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 2000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr("builtins.open", lambda path, mode: Full(path, mode))
    with pytest.raises(DiskFull, match=r"disk full writing .*step_00000002.ckpt .*last good checkpoint step_00000001"):
        files.write(checkpoint(2), tmp_path / files.step_name(2))
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [files.step_name(1)]
    assert files.read(tmp_path / files.step_name(1))["global_step"] == 1


def test_another_error_while_writing_leaves_no_temporary_file(tmp_path):
    with pytest.raises(AttributeError, match="local object"):
        files.write({"f": lambda: 0}, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def test_foreign_files_are_named_for_what_they_are(tmp_path):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6"}, tmp_path / "l.ckpt")
    torch.save({"w": torch.zeros(1)}, tmp_path / "t.ckpt")
    with pytest.raises(NoCheckpoint, match="a Lightning checkpoint of another program"):
        files.read(tmp_path / "l.ckpt")
    with pytest.raises(NoCheckpoint, match="some other torch file"):
        files.read(tmp_path / "t.ckpt")


def test_a_newer_format_asks_for_an_upgrade(tmp_path):
    files.write({"ndeflow": {"format": files.FORMAT + 1}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="is newer than this ndeflow"):
        files.read(tmp_path / "a.ckpt")


def test_locate_takes_files_runs_and_folders_and_prefers_the_best(tmp_path):
    run = tmp_path / "runs" / "a"
    files.write(checkpoint(5), run / "ckpt" / files.step_name(5))
    files.write(checkpoint(7), run / "ckpt" / files.step_name(7))
    assert files.locate(run).name == files.step_name(7)
    assert files.locate(run / "ckpt").name == files.step_name(7)
    assert files.locate(run / "ckpt" / files.step_name(5)).name == files.step_name(5)
    files.write(checkpoint(6), run / "ckpt" / "best.ckpt")
    assert files.locate(run).name == "best.ckpt"
    with pytest.raises(NoCheckpoint, match=r"no checkpoint or run directory .*; .* has: a"):
        files.locate(tmp_path / "runs" / "b")
    (tmp_path / "runs" / "empty").mkdir()
    with pytest.raises(NoCheckpoint, match="holds no checkpoint"):
        files.locate(tmp_path / "runs" / "empty")


def test_a_missing_file_lists_its_neighbors(tmp_path):
    files.write(checkpoint(1), tmp_path / "a.ckpt")
    with pytest.raises(NoCheckpoint, match=r"that folder has: a\.ckpt"):
        files.read(tmp_path / "b.ckpt")


def test_step_files_sort_by_step(tmp_path):
    for step in (100000000, 99999999, 20, 3):
        (tmp_path / files.step_name(step)).touch()
    (tmp_path / "best.ckpt").touch()
    assert [files.step_of(p) for p in files.step_files(tmp_path)] == [3, 20, 99999999, 100000000]
