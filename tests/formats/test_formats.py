import contextlib
import io
import os
import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from approxconv.formats import FormatError, load_function, load_multiplier
from approxconv.multiplier import Multiplier
from approxconv.zoo import get_multiplier


def odd_multiplier(bits=(3, 4), a_signed=False, w_signed=True, name="ödd"):
    """Neither commutative nor zero-preserving, over most of int32."""
    shape = 2 ** bits[0], 2 ** bits[1]
    table = np.random.default_rng(1).integers(-(2**31), 2**31, shape)
    return Multiplier(table, a_signed=a_signed, w_signed=w_signed, name=name)


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def raw_npy(shape, data=b"", descr="'<i4'", version=1):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def archive(members, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def members_of(path):
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "saved.npz"
    odd_multiplier().save(path)
    return path


@pytest.fixture
def refused(tmp_path):
    """Write bytes under a suffix and expect a FormatError that names the file and matches."""

    def check(data, suffix, match, **options):
        path = tmp_path / f"hostile{suffix}"
        path.write_bytes(data)
        with pytest.raises(FormatError, match=match) as caught:
            load_multiplier(path, **options)
        assert str(path) in str(caught.value)

    return check


@pytest.mark.parametrize("flags", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("bits", [(2, 2), (3, 4), (8, 8)])
def test_npz_round_trip(tmp_path, bits, flags):
    m = odd_multiplier(bits, *flags)
    m.save(tmp_path / "m.npz")
    loaded = load_multiplier(str(tmp_path / "m.npz"))
    assert loaded == m
    assert loaded.content_hash == m.content_hash
    assert loaded.name == "ödd"
    assert load_multiplier(tmp_path / "m.npz", name="other").name == "other"


def test_npz_holds_what_is_documented_and_no_pickle(saved):
    assert members_of(saved).keys() == {
        f"{key}.npy" for key in ("format_version", "table", "a_signed", "w_signed", "name", "info", "hash")
    }
    with np.load(saved, allow_pickle=False) as file:
        assert file["table"].dtype == np.int32
        np.testing.assert_array_equal(file["table"], odd_multiplier().table.numpy())
        assert file["format_version"] == 1
        assert (file["a_signed"], file["w_signed"]) == (0, 1)


def test_save_wants_its_suffix(tmp_path):
    for name in ("m", "m.npy", "m.npz.bak"):
        with pytest.raises(ValueError, match=r"\.npz"):
            odd_multiplier().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["m.NPZ", "m.Npz"])
def test_the_suffix_may_be_of_any_case(tmp_path, name):
    odd_multiplier().save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert load_multiplier(tmp_path / name) == odd_multiplier()


def test_a_name_that_no_file_holds_leaves_none(tmp_path):
    with pytest.raises(ValueError, match="surrogates"):
        odd_multiplier(name="\ud800").save(tmp_path / "m.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_says_its_formats_may_be_confirmed_but_not_contradicted(saved):
    assert load_multiplier(saved, a_signed=False, w_signed=True) == odd_multiplier()
    for flags in ({"a_signed": True}, {"w_signed": False}):
        with pytest.raises(FormatError, match=next(iter(flags))):
            load_multiplier(saved, **flags)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<u4", "u8", "i1", "<i2", ">i2", "<i4", ">i4", "<i8"])
def test_bare_npy_signedness_follows_the_dtype_unless_given(tmp_path, dtype):
    table = np.random.default_rng(2).integers(0, 100, (8, 16)).astype(dtype)
    path = tmp_path / "bare.npy"
    path.write_bytes(npy(table))
    signed = np.dtype(dtype).kind == "i"
    m = load_multiplier(path)
    assert (m.a_signed, m.w_signed) == (signed, signed)
    assert m.name == "bare"
    np.testing.assert_array_equal(m.table.numpy(), table)
    m = load_multiplier(path, a_signed=not signed)
    assert (m.a_signed, m.w_signed) == (not signed, signed)
    m = load_multiplier(path, w_signed=not signed, name="given")
    assert (m.a_signed, m.w_signed, m.name) == (signed, not signed, "given")


def test_bare_npy_in_fortran_order_is_not_transposed(tmp_path):
    m = odd_multiplier((2, 3))
    path = tmp_path / "fortran.npy"
    path.write_bytes(npy(np.asfortranarray(m.table.numpy())))
    assert b"'fortran_order': True" in path.read_bytes()
    assert load_multiplier(path, a_signed=False, w_signed=True) == m


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_from_elsewhere_with_one_table(tmp_path, save):
    m = get_multiplier("bam_h1_v2_4u")
    save(tmp_path / "lut.npz", lut=m.table.numpy().astype(np.uint16))
    assert load_multiplier(tmp_path / "lut.npz") == m


def test_npz_from_elsewhere_with_two_tables(tmp_path):
    np.savez(tmp_path / "two.npz", a=np.zeros((4, 4), int), b=np.zeros((4, 4), int))
    with pytest.raises(FormatError, match=r"two\.npz.*one"):
        load_multiplier(tmp_path / "two.npz")


@pytest.mark.parametrize("name", ["m.exe", "m", ".npz", "m.npz.gz"])
def test_of_no_known_format(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FormatError, match=r"npz, npy.*format=") as caught:
        load_multiplier(tmp_path / name)
    assert name in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    for suffix in (".npy", ".npz"):
        with pytest.raises(FileNotFoundError, match="missing"):
            load_multiplier(tmp_path / f"missing{suffix}")


@pytest.mark.parametrize("shape", [(256, 512), (1024, 1024), (16,), (4, 4, 4), (), (5, 4), (2, 2), (0, 4), (1, 16)])
def test_npy_of_a_shape_no_table_has(refused, shape):
    refused(npy(np.zeros(shape, np.int32)), ".npy", "shape|entries|buffer|table")


def test_a_claimed_shape_is_refused_before_its_data_is_looked_for(refused):
    refused(raw_npy("(1099511627776, 1099511627776)"), ".npy", "1099511627776")
    refused(archive({"lut.npy": raw_npy("(1099511627776, 256)")}), ".npz", "1099511627776")


@pytest.mark.parametrize("dtype", ["<c8", "<U3", "|S4", "<M8[s]", "|V4", "?"])
def test_npy_of_no_numbers(refused, dtype):
    refused(npy(np.zeros((4, 4), dtype)), ".npy", "hostile")


def test_npy_with_a_pickle_is_never_unpickled(refused, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "exploded").touch, ()

    objects = np.full((4, 4), Bomb(), dtype=object)
    data = npy(objects, allow_pickle=True)
    refused(data, ".npy", "dtype object|[Oo]bject")
    refused(archive({"lut.npy": data}), ".npz", "dtype object|[Oo]bject")
    assert not (tmp_path / "exploded").exists()


def test_npy_entries_that_no_int32_product_has(refused):
    refused(npy(np.full((4, 4), 2**31)), ".npy", "int32")
    refused(npy(np.full((4, 4), 0.5)), ".npy", "integers", a_signed=False, w_signed=False)
    refused(npy(np.full((4, 4), np.nan)), ".npy", "NaN", a_signed=False, w_signed=False)


def test_truncated_files(refused, saved):
    table = npy(np.zeros((4, 4), np.int32))
    for length in (0, 3, 9, 60, len(table) - 1):
        refused(table[:length], ".npy", "hostile")
    refused(table + b"\0", ".npy", "more bytes|expected")
    data = saved.read_bytes()
    for length in range(0, len(data), 37):
        refused(data[:length], ".npz", "hostile")
    refused(b"PK\x03\x04 no archive", ".npz", "zip|npz")


def test_a_changed_table_or_format_fails_the_hash(refused, saved):
    members = members_of(saved)
    table = odd_multiplier().table.numpy().copy()
    table[1, 2] ^= 1
    refused(archive(members | {"table.npy": npy(table)}), ".npz", "hash")
    refused(archive(members | {"table.npy": npy(odd_multiplier().table.numpy().T.copy())}), ".npz", "hash")
    refused(archive(members | {"a_signed.npy": members["w_signed.npy"]}), ".npz", "hash")


def test_another_format_version_is_refused(refused, saved):
    refused(archive(members_of(saved) | {"format_version.npy": npy(np.int64(2))}), ".npz", "format_version.*1.*got 2")


@pytest.mark.parametrize("key", ["table", "a_signed", "w_signed", "name", "hash"])
def test_a_missing_member_is_refused(refused, saved, key):
    members = members_of(saved)
    del members[f"{key}.npy"]
    refused(archive(members), ".npz", "hostile")


@pytest.mark.parametrize("key", ["format_version", "a_signed", "w_signed", "hash"])
def test_a_member_of_the_wrong_kind_is_refused(refused, saved, key):
    members = members_of(saved)
    for value in (np.arange(5), np.zeros((3, 3, 3)), np.array(["text"]), np.array([None])):
        data = npy(value, allow_pickle=True)
        refused(archive(members | {f"{key}.npy": data}), ".npz", "hostile")


def test_a_member_that_inflates_beyond_a_table_is_refused(refused):
    bomb = archive({"lut.npy": raw_npy("(256, 256)") + bytes(2**24)})
    assert len(bomb) < 2**15
    refused(bomb, ".npz", "expected|at most")


@pytest.mark.parametrize(
    "name", ["../escaped.npy", "/etc/x.npy", "a/b.npy", "a\\b.npy", "c:x.npy", "...npy", "lut", ".."]
)
def test_members_that_are_no_names_are_refused(refused, tmp_path, name):
    refused(archive({name: npy(np.zeros((4, 4), np.int32))}), ".npz", "members")
    assert [p.name for p in tmp_path.iterdir()] == ["hostile.npz"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(refused):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for fill in (1, 2):
            file.writestr("a.npy", npy(np.full((4, 4), fill)))
    refused(buffer.getvalue(), ".npz", "different names")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_inflates_whole_blocks_is_refused(refused, compression):
    refused(archive({"lut.npy": npy(np.zeros((4, 4), np.int32))}, compression), ".npz", "stored or deflated")


@pytest.mark.parametrize("length", [2**31 - 9, 2 * 10**9])
def test_a_header_that_claims_gigabytes_is_refused_in_little_memory(tmp_path, length):
    path = tmp_path / "sparse.npy"
    with path.open("wb") as file:
        file.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", length))
        file.truncate(length + 100)
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"at most .* bytes long"):
        load_multiplier(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize(
    "shape",
    ["(True, 4)", "(-4, -4)", "(4, -4)", "(999999999999999999999999999999, 0)", "(4, 4.0)", "4", "('4', 4)", "()"],
)
def test_npy_shapes_that_are_none(refused, shape):
    refused(raw_npy(shape, bytes(64)), ".npy", "hostile")
    refused(archive({"lut.npy": raw_npy(shape, bytes(64))}), ".npz", "hostile")


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_arrays_end_in_a_multiplier_or_a_format_error(tmp_path, data):
    seed = data.draw(st.sampled_from(range(3)))
    original = [
        npy(np.arange(16, dtype=np.int16).reshape(4, 4)),
        archive({"lut.npy": npy(np.arange(16).reshape(4, 4))}, zipfile.ZIP_STORED),
        archive({"lut.npy": npy(np.arange(16).reshape(4, 4))}),
    ][seed]
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path = tmp_path / ("fuzz.npy" if seed == 0 else "fuzz.npz")
    path.write_bytes(content)
    with contextlib.suppress(FormatError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_multiplier(path)


def test_signs_are_told_by_the_entries_where_they_resemble_products(tmp_path):
    for name in ("drum4_8u_8s", "drum4_8s", "trunc4_8s_8u", "mitchell_4u", "bam_h2_v8_8u", "exact_2s", "trunc6_8u_8s"):
        m = get_multiplier(name)
        for dtype in (np.int32, np.int64):
            np.save(tmp_path / "lut.npy", m.table.numpy().astype(dtype))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert load_multiplier(tmp_path / "lut.npy") == m
    np.save(tmp_path / "lut.npy", np.arange(16).reshape(4, 4) % 5 - 2)
    with pytest.warns(UserWarning, match=r"lut\.npy: neither .* tell .* taken as signed × signed: say a_signed="):
        load_multiplier(tmp_path / "lut.npy")


def test_pipes_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        for load in (load_multiplier, load_function):
            with pytest.raises(FileNotFoundError, match=f"not a regular file: {path}"):
                load(path)
