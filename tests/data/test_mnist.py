"""MNIST: where it is looked for, in which formats, and what is said of files that are missing or damaged."""

import gzip
import hashlib

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from ndeflow.data import MNIST, mnist
from ndeflow.data.files import cache_folder, download

FORMS = ["raw", "gz", "npz"]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No data of the developer's, and no network."""
    monkeypatch.delenv("NDEFLOW_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    nowhere = ((tmp_path / "mirror").as_uri() + "/",)
    monkeypatch.setattr(mnist, "_MIRRORS", {"mnist": nowhere, "fashion_mnist": nowhere})


@pytest.fixture
def publish(tmp_path, monkeypatch, write_mnist, tiny_arrays):
    """Make the tiny files the published ones, offered by a mirror."""
    folder = write_mnist(tmp_path / "mirror", tiny_arrays, "gz")
    sums = {k: hashlib.sha256((folder / f"{f}.gz").read_bytes()).hexdigest() for k, f in mnist._FILES.items()}
    monkeypatch.setattr(mnist, "_SHA256", {"mnist": sums})
    return folder


@pytest.fixture
def folder(request, tmp_path, write_mnist, tiny_arrays, publish):
    return write_mnist(tmp_path / "data", tiny_arrays, request.param)


@pytest.mark.parametrize("folder", FORMS, indirect=True)
def test_formats_hold_the_same_images(folder, tiny_arrays):
    data = MNIST(10, root=str(folder))
    train, val, test = (data.arrays(s) for s in ("train", "val", "test"))
    assert [len(p["x1"]) for p in (train, val, test)] == [55, 5, 20]
    x = torch.cat([train["x1"], val["x1"]])
    assert np.allclose(x[:, 0], tiny_arrays["x_train"] / 127.5 - 1, rtol=0, atol=1e-6)
    assert torch.cat([train["label"], val["label"]]).tolist() == tiny_arrays["y_train"].tolist()
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    assert data.load()["train"].raw.dtype == torch.uint8


@pytest.mark.parametrize("folder", ["raw"], indirect=True)
def test_fewer_training_images_leave_validation_and_test_alone(folder):
    whole, few = MNIST(10, root=str(folder)), MNIST(10, root=str(folder), train_size=20)
    assert torch.equal(few.arrays("train")["x1"], whole.arrays("train")["x1"][:20])
    assert torch.equal(few.arrays("val")["x1"], whole.arrays("val")["x1"])
    with pytest.raises(ValueError, match="train_size=56, but there are 55 training images"):
        MNIST(10, root=str(folder), train_size=56).setup()


@pytest.mark.parametrize("folder", ["raw"], indirect=True)
def test_folders_are_searched_in_order(folder, publish, tmp_path, monkeypatch):
    monkeypatch.setenv("NDEFLOW_DATA", str(folder))
    MNIST(10).prepare_data()
    assert not cache_folder("mnist").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"root=.*empty does not hold the data. Put mnist.npz"):
        MNIST(10, root=str(tmp_path / "empty")).setup()
    monkeypatch.setenv("NDEFLOW_DATA", str(tmp_path / "empty"))
    MNIST(10).arrays("test")
    assert sorted(p.name for p in cache_folder("mnist").iterdir()) == sorted(f"{f}.gz" for f in mnist._FILES.values())


def test_a_download_is_made_once(publish):
    data = MNIST(10)
    data.prepare_data()
    for file in publish.iterdir():
        file.unlink()
    MNIST(10).prepare_data()
    assert len(data.arrays("test")["x1"]) == 20


def test_missing_data_names_the_files_and_the_folder(tmp_path, monkeypatch):
    wanted = r"mnist.npz \(with x_train, y_train.*train-images-idx3-ubyte.gz.*data.root.*NDEFLOW_DATA"
    with pytest.raises(
        FileNotFoundError, match=f"no folder has the data set mnist.*{wanted}.*The download failed: file"
    ):
        MNIST(10).arrays("train")
    with pytest.raises(FileNotFoundError, match=r"no folder has the data set fashion_mnist. Put fashion_mnist.npz"):
        MNIST(10, variant="fashion_mnist").setup()
    with pytest.raises(FileNotFoundError, match=f"root=/nowhere does not exist.*{wanted}"):
        MNIST(10, root="/nowhere").prepare_data()
    monkeypatch.setenv("NDEFLOW_DATA", "/nowhere")
    with pytest.raises(FileNotFoundError, match="NDEFLOW_DATA=/nowhere does not exist"):
        MNIST(10).setup()


def test_a_damaged_download_leaves_nothing_behind(publish):
    victim = publish / "t10k-labels-idx1-ubyte.gz"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte.gz: .* has SHA-256 \w{64}, expected \w{64}"):
        MNIST(10).prepare_data()
    names = [p.name for p in cache_folder("mnist").iterdir()]
    assert len(names) == 3
    assert not any(n.startswith((".", "t10k-labels")) for n in names)


def test_the_second_mirror_helps_out(publish, tmp_path):
    file, mirrors = "t10k-labels-idx1-ubyte.gz", [(tmp_path / "gone").as_uri() + "/", publish.as_uri() + "/"]
    got = download(file, mirrors, tmp_path / "new", mnist._SHA256["mnist"]["y_test"])
    assert got.read_bytes() == (publish / file).read_bytes()
    with pytest.raises(ConnectionError, match=r"gone.*gone"):
        download(file, mirrors[:1] * 2, tmp_path / "new", "")


def overwrite(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("folder", ["raw"], indirect=True)
@pytest.mark.parametrize(
    ("file", "change", "text"),
    [
        ("t10k-images", lambda b: b[:-5], r"holds 15675 bytes after its header, expected 15680 for \(20, 28, 28\)"),
        ("t10k-images", lambda b: b"PK\3\4" + b[4:], "begins with 50 4b 03 04, expected 00 00 08"),
        ("t10k-images", lambda b: b[:7], "expected 00 00 08"),
        ("t10k-images", lambda b: b"", "expected 00 00 08"),
        ("train-labels", lambda b: b[:7] + b"\x3b" + b[8:-1], r"labels are uint8 \(59,\), expected integers \(60,\)"),
        ("train-labels", lambda b: b[:-1] + b"\x0a", "labels run from 0 to 10, expected 0 to 9"),
        ("train-images", lambda b: b[:11] + b"\x0e" + b[12:15] + b"\x38" + b[16:], r"uint8 \(60, 14, 56\), expected"),
    ],
)
def test_damaged_raw_files_are_named(folder, file, change, text):
    (path,) = folder.glob(f"{file}*")
    overwrite(path, change)
    with pytest.raises(ValueError, match=f"{path.name}.*{text}"):
        MNIST(10, root=str(folder)).setup()


@pytest.mark.parametrize("folder", ["gz"], indirect=True)
def test_gzipped_files_must_be_the_published_ones(folder):
    file = folder / "train-labels-idx1-ubyte.gz"
    body = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(body, compresslevel=1, mtime=1))
    with pytest.raises(
        ValueError, match=r"train-labels.*has SHA-256 \w{64}, expected \w{64}: it is damaged or another"
    ):
        MNIST(10, root=str(folder)).setup()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.gz is damaged"):
        mnist.read_idx(file)


@pytest.mark.parametrize("folder", ["npz"], indirect=True)
def test_damaged_npz_files_are_named(folder, tiny_arrays):
    path = folder / "mnist.npz"
    middle = path.stat().st_size // 2
    overwrite(path, lambda b: b[:middle] + bytes([b[middle] ^ 1]) + b[middle + 1 :])
    with pytest.raises(ValueError, match=r"mnist.npz is damaged"):
        MNIST(10, root=str(folder)).setup()
    np.savez(path, **{k: v for k, v in tiny_arrays.items() if k != "y_test"})
    with pytest.raises(ValueError, match=r"holds x_train, x_test, y_train; expected .*: missing y_test"):
        MNIST(10, root=str(folder)).setup()
    np.savez(path, **tiny_arrays | {"x_test": tiny_arrays["x_test"] / 255})
    with pytest.raises(ValueError, match=r"images are float64 \(20, 28, 28\), expected uint8"):
        MNIST(10, root=str(folder)).setup()


@pytest.mark.parametrize("bad", [{"variant": "kmnist"}, {"train_size": 0}])
def test_bad_arguments_are_refused(bad):
    with pytest.raises(ValueError, match=r"kmnist.*mnist, fashion_mnist|train_size=0 must be at least 1"):
        MNIST(10, **bad)


def test_the_real_images_are_the_well_known_ones(real_data):
    if not (real_data / "mnist.npz").is_file():
        pytest.skip("no mnist.npz in the folder of real data")
    data = MNIST(100, root=str(real_data))
    train, test = data.arrays("train"), data.arrays("test")
    assert [len(p["x1"]) for p in (train, data.arrays("val"), test)] == [55000, 5000, 10000]
    gray = (torch.cat([train["x1"], data.arrays("val")["x1"]]) + 1) / 2
    assert gray.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert gray.std().item() == pytest.approx(0.3081, abs=1e-4)
    nearest = KNeighborsClassifier(1).fit(train["x1"][:5000].flatten(1), train["label"][:5000])
    assert nearest.score(test["x1"][:500].flatten(1), test["label"][:500]) > 0.9
