"""Readers: exact on real files, one clear error on damaged ones, and nothing in a file is ever run."""

from __future__ import annotations

import argparse
import gzip
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from components.common.errors import RetortError
from components.weights.readers import read
from tests.components.weights.conftest import (
    PADDLE,
    examples,
    lodtensor,
    tar_of,
    tensors,
    torch_file,
)
from tests.components.weights.fuzz import mutate

KINDS = ("lodtensor.tar", "pdparams", "pdparams, protocol 2", "pth", "pth, row", "safetensors")
MUTATIONS = 300


@pytest.fixture(scope="module")
def kinds() -> dict[str, bytes]:
    return examples()


def put(content: bytes, name: str = "weights") -> Path:
    path = Path(name)
    path.write_bytes(content)
    return path


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, strict=True)


# --- what is read -----------------------------------------------------------------------------------------


def test_variables_that_paddle_saved_are_read_exactly() -> None:
    true = dict(np.load(PADDLE / "lod_values.npz"))
    found = read(PADDLE / "lodtensor").tensors
    same({name: found[name] for name in true}, true)


def test_the_same_variables_in_a_tar() -> None:
    files = {f"net/{path.name}": path.read_bytes() for path in (PADDLE / "lodtensor").iterdir()}
    found = read(put(tar_of(files)))
    same(dict(sorted(found.tensors.items())), dict(sorted(read(PADDLE / "lodtensor").tensors.items())))


def test_a_state_dict_that_paddle_saved_is_read_exactly() -> None:
    found = read(PADDLE / "tiny.pdparams").tensors
    true = dict(np.load(PADDLE / "tiny_pdparams_values.npz"))
    same({name: found[name] for name in true}, true)
    assert set(found) == set(true), "the table of other names is no tensor"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_tensors(kinds: dict[str, bytes], kind: str) -> None:
    found = read(put(kinds[kind])).tensors
    same({name: found[name] for name in tensors()}, tensors())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol_and_order(protocol: int) -> None:
    arrays = {
        **tensors(),
        "fortran": np.asfortranarray(tensors()["fc.weight"]),
        "scalar": np.float32(2).reshape(()),
    }
    same(read(put(pickle.dumps(arrays, protocol=protocol))).tensors, arrays)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_with_views_types_and_arguments(zipped: bool) -> None:
    base = torch.arange(24.0).view(4, 6)
    content = {
        "arch": "resnet18",
        "args": argparse.Namespace(lr=0.1, data=["a"], out=Path("runs")),
        "best_accuracy": torch.tensor(0.7),
        "optimizer": {"state": {0: {"momentum": base}}},
        "state_dict": {
            "module.transposed": base.t(),
            "module.part": base[1:3, 2:4],
            "module.half": base.half(),
            "module.double": base.double(),
            "module.bfloat": base.bfloat16(),
            "module.parameter": torch.nn.Parameter(base),
            "module.count": torch.tensor(7),
        },
    }
    stored = read(put(torch_file(content, zipped)))
    assert stored.arch == "resnet18"
    assert stored.notes == [
        "taken from inside 'state_dict'", "'module.' taken off every name", "bfloat16 converted to float32"
    ]  # fmt: skip
    for name, tensor in content["state_dict"].items():
        values = (
            tensor.detach().float().numpy() if tensor.dtype == torch.bfloat16 else tensor.detach().numpy()
        )
        np.testing.assert_array_equal(stored.tensors[name.removeprefix("module.")], values, strict=True)


def test_a_path_as_python_3_13_writes_it_is_skipped_as_an_older_one_is() -> None:
    written = torch_file({"args": Path("runs"), "state_dict": {"weight": torch.arange(3.0)}}, False)
    older, newer = b"cpathlib\nPosixPath\n", b"cpathlib._local\nPosixPath\n"
    assert (older in written) != (newer in written), "one of the two, by the Python that runs this"
    for path in (written.replace(newer, older), written.replace(older, newer)):
        np.testing.assert_array_equal(read(put(path)).tensors["weight"], np.arange(3, dtype=np.float32))


def test_numbers_that_numpy_has_not_are_refused_by_name() -> None:
    content = put(save_safetensors({"conv.weight": torch.zeros(2).to(torch.float8_e4m3fn)}))
    with pytest.raises(
        RetortError, match=r"tensor 'conv\.weight' is of torch\.float8_e4m3fn, which no start"
    ):
        read(content)


def test_safetensors_of_all_types() -> None:
    base = torch.arange(6.0).view(2, 3)
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]
    content = {str(kind): base.to(kind) for kind in types}
    stored = read(put(save_safetensors(content)))
    assert stored.notes == ["bfloat16 converted to float32"]
    found = stored.tensors
    for name, tensor in content.items():
        values = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        np.testing.assert_array_equal(found[name], values, strict=True)


def test_averaged_weights_are_taken_only_where_there_are_no_others() -> None:
    own, averaged = {"a.weight": torch.zeros(2)}, {"a.weight": torch.ones(2)}
    stored = read(put(torch_file({"model_ema": averaged, "model": own})))
    assert stored.notes == ["taken from inside 'model', not 'model_ema'"]
    assert not stored.tensors["a.weight"].any()
    assert read(put(torch_file({"model_ema": averaged}))).tensors["a.weight"].all()
    with pytest.raises(RetortError, match=r"no table of tensors .*; it has teacher, epoch"):
        read(put(torch_file({"teacher": own, "epoch": 3})))


# --- what is refused --------------------------------------------------------------------------------------


class Bomb:
    """Unpickled by Python, it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_nothing_in_a_pickle_is_run() -> None:
    for content in (
        pickle.dumps({**tensors(), "x": Bomb()}, protocol=4),
        pickle.dumps({**tensors(), "x": Bomb()}, protocol=2),
        torch_file({"x": Bomb()}),
        torch_file({"x": Bomb()}, zipped=False),
    ):
        with pytest.raises(RetortError, match=r"asks to run posix\.mkdir.*nothing was run"):
            read(put(content))
    assert not Path("executed").exists()


def member(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("others", "files", "message"),
    [
        ([], {"../escape": lodtensor(np.ones(2))}, "'../escape' would leave the folder"),
        ([], {"net/../../escape": lodtensor(np.ones(2))}, "would leave the folder"),
        ([], {"/etc/passwd": lodtensor(np.ones(2))}, "'/etc/passwd' would leave the folder"),
        ([member("link", tarfile.SYMTYPE, "/etc/passwd")], {}, "link is a symbolic link"),
        ([member("link", tarfile.LNKTYPE, "other")], {}, "link is a hard link"),
        ([member("device", tarfile.CHRTYPE)], {}, "device is a device"),
        ([member("pipe", tarfile.FIFOTYPE)], {}, "pipe is a pipe"),
        ([], {"a/w": lodtensor(np.ones(2)), "b/w": lodtensor(np.ones(2))}, "two files called w"),
        ([], {"README.txt": b"hello"}, r"README.txt: no LoDTensor"),
        ([member("net", tarfile.DIRTYPE)], {}, "a tar without files"),
    ],
)
def test_tars_that_are_no_tars_of_variables(
    others: list[tarfile.TarInfo], files: dict[str, bytes], message: str
) -> None:
    with pytest.raises(RetortError, match=message):
        read(put(tar_of(files, *others)))


def test_a_link_in_a_folder_is_refused() -> None:
    Path("net").mkdir()
    put(lodtensor(np.ones(2)), "net/w")
    Path("net/x").symlink_to("/etc/hostname")
    with pytest.raises(RetortError, match=r"net/x: not a plain file"):
        read(Path("net"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.999])
def test_half_a_file(kinds: dict[str, bytes], kind: str, share: float) -> None:
    whole = kinds[kind].rstrip(b"\0") if kind.endswith("tar") else kinds[kind]
    with pytest.raises(RetortError) as caught:
        read(put(whole[: int(len(whole) * share)], "half"))
    assert str(caught.value).startswith("half: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>\n<html><title>404</title></html>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (gzip.compress(b"weights", mtime=0), "a compressed file; unpack it"),
        (b"\x00\x01\x02" * 300, "neither .safetensors, .pth"),
        (pickle.dumps([1, 2, 3]), "no table of tensors"),
        (torch_file({"epoch": 3}), "no table of tensors"),
    ],
)
def test_files_that_are_no_weights(content: bytes, message: str) -> None:
    with pytest.raises(RetortError, match=message):
        read(put(content, "ResNet50_vd_10w_pretrained.tar"))


def test_lengths_that_lie_take_no_memory() -> None:
    huge = 1 << 40
    lod = bytearray(lodtensor(np.ones(3)))
    for content, message in (
        (struct.pack("<Q", huge) + b"{}", "neither|cut off"),
        (
            b'\x50\0\0\0\0\0\0\0{"w":{"dtype":"F32","shape":[1099511627775],"data_offsets":[0,8]}}'.ljust(96),
            "not a whole .safetensors file .invalid shape, data type, or offset",
        ),
        (b"\x80\x04\x8e" + struct.pack("<Q", huge) + b"x.", "longer than the file"),
        (b"\x80\x04\x96" + struct.pack("<Q", huge) + b"x.", "longer than the file"),
        (
            b"\x80\x02Nr\xff\xff\xff\xff.",
            "no table of tensors",
        ),  # a memo of four billion places, for Python's
        (tar_of({"w": bytes(lod.replace(b"\x10\x03", b"\x10\x7f"))}), "needs 508 bytes, there are only 12"),
    ):
        with pytest.raises(RetortError, match=message):
            read(put(content))


def test_bytes_that_are_used_again_and_again_are_refused() -> None:
    whole = pickle.dumps(np.ones(1000, np.float32), protocol=4)
    assert whole.endswith(b"b.")
    # the state is taken again from the memo, and the array built from it once more, as often as one likes
    last = max(place for place in range(40) if bytes([0x68, place]) not in whole)
    again = (
        b"\x80\x04}X\x01\0\0\0w"
        + whole[2 + 9 : -2]
        + bytes([0x71, last])
        + b"b"
        + bytes([0x68, last, 0x62]) * 3
    )
    with pytest.raises(RetortError, match="the same bytes again and again"):
        read(put(again + b"s."))
    entry = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    header = f'{{"a":{entry},"b":{entry}}}'.encode()
    with pytest.raises(RetortError, match=r"not a whole \.safetensors file \(invalid offset for tensor"):
        read(put(struct.pack("<Q", len(header)) + header + bytes(8)))


def test_tables_in_tables_do_not_multiply() -> None:
    """Each of five levels refers a thousand times to the one below: a thousand to the fifth, if followed."""
    table: dict[str, Any] = {"w": np.ones(3, np.float32)}
    for _ in range(5):
        table = {f"k{number}": table for number in range(1000)}
    with pytest.raises(RetortError, match="no table of tensors"):
        read(put(pickle.dumps(table, protocol=4)))


# --- fuzzing: the short version of tests/benchmarks/bench_weights.py ----------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_give_one_clear_error_or_are_read(kinds: dict[str, bytes], kind: str) -> None:
    refused = 0
    for seed in range(MUTATIONS):
        path = put(mutate(seed, kinds[kind]), "damaged")
        try:
            stored = read(path)
        except RetortError as error:
            refused += 1
            message = str(error)
            assert message.startswith("damaged"), seed
            assert len(message) < 600, seed
            assert message.isprintable(), seed
        else:
            assert all(isinstance(values, np.ndarray) for values in stored.tensors.values()), seed
    assert refused > MUTATIONS / 4
    assert not Path("out").exists()
