"""Pickles are read as data: nothing in them is executed, and nothing but plain values comes out."""

import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_official import RANDOM, dump
from undistill.core.errors import DataError
from undistill.data.unpickle import read_batch


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, protocol: int) -> None:
    dump(tmp_path / "batch", {b"data": Evil(tmp_path / "done")}, protocol)
    with pytest.raises(DataError, match=r"mkdir.*Nothing of it was executed"):
        read_batch(tmp_path / "batch")
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "value",
    [np.array([Path()]), np.zeros(3, np.float32), np.zeros(3, "V4"), np.dtype("O"), slice(1), {1, 2}.union, 1 + 2j],
    ids=["objects", "float32", "void", "dtype", "slice", "method", "complex"],
)
def test_only_plain_containers_and_number_arrays_are_built(tmp_path: Path, value: object) -> None:
    dump(tmp_path / "batch", {b"data": value})
    with pytest.raises(DataError, match="is not used"):
        read_batch(tmp_path / "batch")


def test_bytes_as_python_2_wrote_them(tmp_path: Path) -> None:
    """The authors' own files: protocol 2, where the bytes of an array are a BINSTRING."""
    values = RANDOM.integers(0, 256, (2, 3), np.uint8)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I2\nI3\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nU\x06"
        + values.tobytes()
        + b"tb"
    )
    (tmp_path / "batch").write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels](I6\nI9\neu.")
    batch = read_batch(tmp_path / "batch")
    assert np.array_equal(batch["data"], values)
    assert batch["labels"] == [6, 9]


NEVER_ENDS = b")q\x01" + b"h\x01\x86q\x01" * 40
"""A tuple of two tuples of two tuples: 2 to the power of 40 values to hash, or to print."""
TOO_DEEP = b")" + b"\x85" * 400_000
"""A tuple in a tuple in a tuple: to hash it overflows the stack."""
ENCODE = b"\x80\x02}(U\x01ac_codecs\nencode\n"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n)R"
TYPE = b"cnumpy\ndtype\n(U\x02u1tR"
CRAFTED = {
    "an endless name": b"\x80\x02}" + NEVER_ENDS + b"K\x01s.",
    "a deep name": b"\x80\x02}" + TOO_DEEP + b"K\x01s.",
    "a deep name in protocol 0": b"(" + TOO_DEEP + b"K\x01d.",
    "a deep member of a set": b"\x80\x04\x8f(" + TOO_DEEP + b"\x90.",
    "a deep member of a frozen set": b"\x80\x04(" + TOO_DEEP + b"\x91.",
    "an endless text": ENCODE + b"(" + NEVER_ENDS + b"U\x06latin1tRu.",
    "a deep text": ENCODE + b"(" + TOO_DEEP + b"U\x06latin1tRu.",
    "an endless encoding": ENCODE + b"(U\x01a" + NEVER_ENDS + b"tRu.",
    "an endless type": b"\x80\x02}(U\x01acnumpy\ndtype\n(" + NEVER_ENDS + b"tRu.",
    "a deep value": b"\x80\x02}(U\x01a" + TOO_DEEP + b"u.",
    "the stand-in itself": b"\x80\x02}(U\x01acnumpy\nndarray\nu.",
    "the encoder itself": b"\x80\x02}(U\x01ac_codecs\nencode\nu.",
    "changes the encoder": b"\x80\x02c_codecs\nencode\nN}U\x0c__defaults__(U\x05utf-8ts\x86b0}.",
    "a set": pickle.dumps({"a": {1, 2}}, 4),
    "without init": b"\x80\x02}(U\x01acnumpy\nndarray\n)\x81u.",
    "a list that holds itself": b"\x80\x02}(U\x01a]q\x00h\x00au.",
    "a huge number": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "an endless call": b"\x80\x02}U\x01a" + NEVER_ENDS + b"NRs.",
    "a dict with an endless name of its own": b"\x80\x02}U\x01a(}}U\x08__name__" + NEVER_ENDS + b"sbos.",
    "a call with bytes to unroll": b"\x80\x02}(U\x01acnumpy\nndarray\nU\x02xxRu.",
    "a dict with fields": b"\x80\x02}}U\x05otherK\x01sb.",
    "a step that takes memory": b"\x80\x05\x96\x00\x00\x00\x50\x00\x00\x00\x00.",
    "an array of endless shape": b"\x80\x02}(U\x01a" + ARRAY + b"(K\x01" + NEVER_ENDS + TYPE + b"\x89U\x00tbu.",
}


@pytest.mark.parametrize("content", CRAFTED.values(), ids=CRAFTED)
def test_crafted_pickles_are_refused_in_a_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(content)
    with pytest.raises(DataError, match="is not used"):
        read_batch(tmp_path / "batch")


def test_arrays_in_every_order_and_width(tmp_path: Path) -> None:
    values = RANDOM.integers(0, 200, (4, 6))
    for kind in ("u1", "<i8", ">i8"):
        for order in (values.astype(kind), np.asfortranarray(values.astype(kind))):
            dump(tmp_path / "batch", {b"data": order})
            assert np.array_equal(read_batch(tmp_path / "batch")["data"], values)


def test_a_small_pickle_that_names_one_list_again_and_again_stays_small(tmp_path: Path) -> None:
    """Copied wherever it is named, this would be 2 to the power of 60 values."""
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    dump(tmp_path / "batch", {b"data": value})
    held = read_batch(tmp_path / "batch")["data"]
    assert held[0] is held[1]


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_small_pickle_that_names_one_text_again_and_again_stays_small(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(pickle.dumps({b"data": [b"\xff" * 1000] * 3}, protocol))
    held = read_batch(tmp_path / "batch")["data"]
    assert held[0] is held[1] is held[2]


def test_one_text_is_encoded_once(tmp_path: Path) -> None:
    encoded = b"c_codecs\nencode\n(h\x00U\x06latin1tR"
    (tmp_path / "batch").write_bytes(b"\x80\x02}(U\x01a](U\x04same" + b"q\x00" + 2 * encoded + b"eu.")
    held = read_batch(tmp_path / "batch")["a"]
    assert held[0] == "same"
    assert held[1] is held[2]


FEW = {
    "a huge memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "bytes of many arrays": b"\x80\x02}(U\x01a](T\x40\x42\x0f\x00"
    + 1_000_000 * b"x"
    + b"q\x00"
    + 300 * (ARRAY + b"(K\x01J\x40\x42\x0f\x00\x85" + TYPE + b"\x89h\x00tb")
    + b"eu.",
}


@pytest.mark.parametrize("content", FEW.values(), ids=FEW)
def test_a_small_pickle_takes_little_memory(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(content)
    tracemalloc.start()
    try:
        read_batch(tmp_path / "batch")
    except DataError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20 * len(content) + 1_000_000


def test_a_damaged_batch_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(b"\x80\x02}")
    with pytest.raises(DataError, match=r"not used: .+ remove it"):
        read_batch(tmp_path / "batch")
