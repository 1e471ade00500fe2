"""What every file format must do. To add one, subclass `FormatTests`."""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod

import oracle
import pytest
from encoded import NAMES, contents, raws, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from auto_trans.core.tensor import ITEM_BYTES
from auto_trans.errors import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError
from auto_trans.storage.formats import FORMATS, Format, format_of, scan
from auto_trans.storage.formats import ckpt as ckpt_module
from auto_trans.storage.readers import LocalReader

per_class = settings(suppress_health_check=[HealthCheck.differing_executors], max_examples=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("formats")


class FormatTests(ABC):
    """Encode, write, scan."""

    format: Format
    dtypes: tuple[str, ...]

    @abstractmethod
    def unnoticed(self, content: bytes, head) -> set[int]:
        """The lengths at which a file may be cut without being damaged: only the plan notices what is missing."""

    def check(self, folder, tensors):
        path = folder / f"x{self.format.suffix}"
        order = write(self.format, path, tensors)
        head = scan(path)
        assert list(head.tensors) == order and set(order) == set(tensors)
        assert (head.path, head.size, head.mtime_ns) == (path, path.stat().st_size, path.stat().st_mtime_ns)
        for name, raw in tensors.items():
            found = head.tensors[name]
            assert (found.dtype, contents(path, found.segments)) == (raw.dtype, raw.content), name
            is_scalar = raw.dims == (0,) and raw.content
            assert found.shape == (() if is_scalar else raw.dims), name
            assert found.nbytes == len(raw.content)
        return head

    def test_name_is_the_ending(self):
        assert FORMATS[self.format.name] is self.format
        assert self.format.suffix == f".{self.format.name}"

    def test_every_type_is_bit_identical(self, folder):
        tensors = {}
        for number, dtype in enumerate(self.dtypes):
            size = ITEM_BYTES[dtype]
            tensors[f"layer.{dtype}"] = oracle.Raw(dtype, (2, 3), bytes(range(number, number + 6 * size)))
            tensors[f"scalar.{dtype}"] = oracle.Raw(dtype, (), b"\xff" * size)
        self.check(folder, tensors)

    @pytest.mark.parametrize("dims", [(), (0,), (1,), (0, 4), (3, 0), (2, 0, 2), (1, 1, 1, 1, 1)])
    def test_dims_are_kept(self, folder, dims):
        nbytes = 0 if 0 in dims else 4
        last = oracle.Raw("Float32", (2,), b"12345678")
        self.check(folder, {"w": oracle.Raw("Float32", dims, b"abcd"[:nbytes]), "last": last})
        self.check(folder, {"first": last, "w": oracle.Raw("Float32", dims, b"abcd"[:nbytes])})
        self.check(folder, {"w": oracle.Raw("Float32", dims, b"abcd"[:nbytes])})

    def test_scalar_that_mindspore_stores_under_dims_of_zero(self, folder):
        self.check(folder, {"step": oracle.Raw("Int32", (0,), b"\1\0\0\0")})

    @pytest.mark.parametrize("name", ["naïve.名前", "a b", 'quote"back\\slash', "\n\t\0", "😀" * 50, ".", "w" * 5000])
    def test_any_name_is_kept(self, folder, name):
        self.check(folder, {name: oracle.Raw("Int8", (2,), b"ab"), "w": oracle.Raw("Int8", (1,), b"c")})

    def test_many_tensors(self, folder):
        names = [f"model.layers.{i}.{kind}.weight" for i in range(1000) for kind in ("wq", "wk", "w1")]
        self.check(folder, {name: oracle.Raw("UInt16", (1,), n.to_bytes(2, "little")) for n, name in enumerate(names)})

    @per_class
    @given(data=st.data())
    def test_any_tensors_are_bit_identical(self, folder, data):
        self.check(folder, data.draw(st.dictionaries(NAMES, raws(self.dtypes), min_size=1, max_size=6)))

    def sample(self):
        return {
            "naïve.wq": oracle.Raw("Float32", (2, 2), b"0123456789abcdef"),
            "scalar": oracle.Raw("Int32", (), b"\1\2\3\4"),
            "empty": oracle.Raw("Float16", (0, 4), b""),
            "norm": oracle.Raw("BFloat16", (3,), b"abcdef"),
        }

    def test_every_length_that_is_short_is_refused_by_name(self, folder):
        path = folder / f"whole{self.format.suffix}"
        write(self.format, path, self.sample())
        content, unnoticed = path.read_bytes(), self.unnoticed(path.read_bytes(), scan(path))
        cut = folder / f"cut{self.format.suffix}"
        for length in set(range(len(content))) - unnoticed:
            cut.write_bytes(content[:length])
            with pytest.raises(CorruptCheckpointError, match=rf"cut\{self.format.suffix}"):
                scan(cut)

    def scan_or_refuse(self, path):
        try:
            head = scan(path)
        except CheckpointError as e:
            assert path.name in str(e)
            return
        for name, tensor in head.tensors.items():
            assert name.encode() and tensor.dims is not None and min(tensor.dims, default=0) >= 0
            assert all(offset >= 0 and offset + nbytes <= head.size for offset, nbytes in tensor.segments)

    @per_class
    @given(content=st.binary(max_size=300))
    def test_garbage_is_refused_by_name(self, folder, content):
        path = folder / f"garbage{self.format.suffix}"
        path.write_bytes(content)
        self.scan_or_refuse(path)

    @settings(per_class, max_examples=150)
    @given(data=st.data())
    def test_damage_is_refused_by_name_or_leaves_a_file_that_can_be_read(self, folder, data):
        path = folder / f"damaged{self.format.suffix}"
        write(self.format, path, self.sample())
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        self.scan_or_refuse(path)

    def test_file_that_is_not_there_is_named(self, folder):
        with pytest.raises(CheckpointError, match=rf"nowhere\{self.format.suffix} cannot be read"):
            scan(folder / f"nowhere{self.format.suffix}")
        (folder / f"folder{self.format.suffix}").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match=rf"folder\{self.format.suffix} cannot be read"):
            scan(folder / f"folder{self.format.suffix}")

    def test_contents_are_not_read(self, folder):
        """A file of any size is scanned by small reads at its heads."""
        path = folder / f"large{self.format.suffix}"
        size = 64 * 1024 * 1024
        write(self.format, path, {name: oracle.Raw("Int8", (size // 4,), bytes(size // 4)) for name in "abcd"})
        reads = []

        class Counting(LocalReader):
            def read(self, offset, nbytes):
                found = super().read(offset, nbytes)
                reads.append(found.nbytes)
                return found

        with contextlib.closing(Counting(path)) as reader:
            assert list(self.format.scan(reader).tensors) == list("abcd")
        path.unlink()
        assert len(reads) < 10 and sum(reads) < 10_000


class TestCkpt(FormatTests):
    format = FORMATS["ckpt"]
    dtypes = tuple(ITEM_BYTES)

    def unnoticed(self, content, head):
        """A file is a sequence of parameters; where one ends, the file may."""
        return {sum(tensor.segments[-1]) for tensor in head.tensors.values()}

    @pytest.mark.parametrize("chunk", [1, 3, 4, 5, 16, 100])
    def test_chunked_tensors_are_bit_identical(self, folder, chunk, monkeypatch):
        monkeypatch.setattr(ckpt_module, "CHUNK_BYTES", chunk)
        head = self.check(folder, self.sample())
        assert len(head.tensors["naïve.wq"].segments) == -(-16 // chunk)

    def test_texts_and_packed_integers_are_one_element(self, folder):
        path = folder / "opaque.ckpt"
        text = oracle.Raw("str", (4,), "text".encode("utf-32-le"))
        write(self.format, path, {"note": text, "packed": oracle.Raw("Int4", (3,), b"ab")})
        head = scan(path)
        assert [tensor.shape for tensor in head.tensors.values()] == [(), ()]
        assert contents(path, head.tensors["note"].segments) == text.content


class TestSafetensors(FormatTests):
    format = FORMATS["safetensors"]
    dtypes = tuple(dtype for dtype in ITEM_BYTES if dtype != "Complex128")

    def unnoticed(self, content, head):
        return set()

    @pytest.mark.parametrize("dtype", ["Complex128", "str", "Int4"])
    def test_types_that_it_lacks_are_refused(self, folder, dtype):
        with pytest.raises(UnsupportedCheckpointError, match=f"parameter w is of type {dtype}"):
            write(self.format, folder / "x.safetensors", {"w": oracle.Raw(dtype, (1,), bytes(16))})

    def test_name_that_the_format_keeps_for_itself_is_refused(self, folder):
        with pytest.raises(UnsupportedCheckpointError, match=r"parameter __metadata__ .*write \.ckpt files"):
            write(self.format, folder / "x.safetensors", {"__metadata__": oracle.Raw("Int8", (1,), b"x")})

    @pytest.mark.parametrize(
        "header",
        [
            "[" * 100_000,
            '{"w": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}',
            '{"w": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
            '{"w": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
            '{"w": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
            '{"w": {"dtype": "F32", "shape": [0, 1000000000000000000000], "data_offsets": [0, 0]}}',
            '{"w": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
            '{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}',
            '{"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
            '{"w": {"dtype": "F32", "shape": [1]}}',
            '{"w": []}',
            '{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": "w"}',
            '{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": ["v"]}',
            '{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"crc_num": "many"}}',
            '{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"remove_redundancy": []}}',
            '{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            '"w"',
            "{}",
            '{"__metadata__": {"format": "ms"}}',
        ],
    )
    def test_header_that_is_none_is_refused_by_name(self, folder, header):
        path = folder / "bad.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
        with pytest.raises(CorruptCheckpointError, match=r"bad\.safetensors is not a complete safetensors file"):
            scan(path)

    def test_metadata_that_mindspore_writes_are_read(self, folder):
        header = {
            "__metadata__": {"format": "ms", "remove_redundancy": "True", "crc_num": "17"},
            "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        }
        raw = json.dumps(header).encode()
        path = folder / "meta.safetensors"
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
        assert (scan(path).redundancy_removed, scan(path).crc) == (True, 17)


def test_every_format_is_tested():
    tested = {cls.format.name for cls in FormatTests.__subclasses__()}
    assert tested == set(FORMATS)


def test_format_is_told_by_the_ending(tmp_path):
    assert [format_of(tmp_path / f"x.{name}").name for name in FORMATS] == list(FORMATS)
