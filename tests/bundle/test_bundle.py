"""Bundles: what is written is read again, to the byte, and whatever was altered is refused."""

import hashlib
import json
import stat
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_bundle import FILES, make_manifest

from dvexport.bundle import archive as bundle_module
from dvexport.bundle.archive import GOLDEN, MANIFEST, Bundle, write_bundle
from dvexport.errors import BundleError, DeviceError
from dvexport.graph.weights import ALIGNMENT


@pytest.fixture
def written(tmp_path):
    return write_bundle(tmp_path / "a.dvx", make_manifest(), FILES)


def rezip(path, members, *, compression=zipfile.ZIP_STORED):
    """Write a zip with `members`, pairs of a name or ZipInfo and bytes, by other means than ours."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def with_manifest(path, change):
    """Rewrite the bundle at `path` with its manifest's JSON changed in place by `change`."""
    members = dict(members_of(path))
    values = json.loads(members[MANIFEST])
    change(values)
    members[MANIFEST] = json.dumps(values).encode()
    return rezip(path, members.items())


def test_round_trip(written, tmp_path):
    opened = Bundle.open(tmp_path / "a.dvx")
    assert opened.manifest == written.manifest
    assert {name: opened.read(name) for name in opened.manifest.files} == FILES
    assert opened.manifest.files["model.onnx"].sha256 == hashlib.sha256(FILES["model.onnx"]).hexdigest()
    assert opened.manifest.preprocess.frame_rate == 12.5
    np.testing.assert_array_equal(opened.golden()["frames"], [[0, 1, 2], [3, 4, 5]])


def test_the_same_content_gives_the_same_bytes(written, tmp_path):
    source = tmp_path / "model.onnx"
    source.write_bytes(FILES["model.onnx"])
    files = dict(reversed(FILES.items())) | {"model.onnx": source}
    again = write_bundle(tmp_path / "b.dvx", make_manifest(), files)
    assert again.path.read_bytes() == written.path.read_bytes()


def test_members_are_sorted_stored_and_dated_1980(written):
    with zipfile.ZipFile(written.path) as archive:
        infos = archive.infolist()
    assert [info.filename for info in infos] == sorted([*FILES, MANIFEST])
    assert {(info.date_time, info.compress_type) for info in infos} == {((1980, 1, 1, 0, 0, 0), 0)}


def test_files_for_whoever_maps_the_bundle_start_at_a_multiple_of_64_bytes(tmp_path):
    content = bytes(range(100))
    files = {**FILES, "weights.bin": content, "own/weights.bin": content + b"1", "own/odd": content + b"2"}
    data = write_bundle(tmp_path / "a.dvx", make_manifest(), files, aligned={"own/odd"}).path.read_bytes()
    assert [data.index(files[name]) % 64 for name in ("own/weights.bin", "own/odd")] == [0, 0]
    plain = write_bundle(tmp_path / "b.dvx", make_manifest(), files).path.read_bytes()
    assert plain.index(files["own/odd"]) % 64, "without being asked it starts anywhere"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_is_refused_or_harmless(written, tmp_path, place, flip):
    raw = bytearray(written.path.read_bytes())
    raw[int(place * len(raw))] ^= flip
    path = tmp_path / "changed.dvx"
    path.write_bytes(raw)
    try:
        changed = Bundle.open(path)
        contents = {name: changed.read(name) for name in changed.manifest.files}
    except BundleError:
        return
    assert changed.manifest == written.manifest
    assert contents == FILES


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_bundle_is_refused(written, tmp_path, share):
    raw = written.path.read_bytes()
    path = tmp_path / "short.dvx"
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(BundleError):
        Bundle.open(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(BundleError, match="No such file"):
        Bundle.open(tmp_path / "no.dvx")
    with pytest.raises(BundleError, match="directory"):
        Bundle.open(tmp_path)


def test_altered_content(written):
    members = dict(members_of(written.path))
    members["model.onnx"] = b"\0" * len(members["model.onnx"])
    rezip(written.path, members.items())
    with pytest.raises(BundleError, match=r"'model.onnx' of the bundle was altered"):
        Bundle.open(written.path)


def damage(path, how):
    """Change a file in place, as another program might."""
    with path.open("r+b") as file:
        if how == "cut":
            file.truncate(0)
        else:
            file.write(b"\x3f" * path.stat().st_size)


@pytest.mark.parametrize("how", ["cut", "overwrite"])
def test_what_was_read_stays_whatever_becomes_of_the_file(written, how):
    array = written.array("model.onnx")
    assert (array.ctypes.data % ALIGNMENT, array.flags.writeable) == (0, False)
    part = array[1:5]
    del array
    damage(written.path, how)
    assert bytes(part) == FILES["model.onnx"][1:5]
    assert bytes(written.array("model.onnx")) == FILES["model.onnx"]  # what `part` keeps
    del part
    with pytest.raises(BundleError):
        written.array("model.onnx")


def test_an_array_is_checked_when_it_is_read(written):
    data = written.path.read_bytes()
    at = data.index(FILES["model.onnx"])
    written.path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(BundleError):
        written.array("model.onnx")
    with pytest.raises(BundleError, match="has no file 'other'"):
        written.array("other")


def test_an_array_that_memory_does_not_hold(written, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(DeviceError, match="too little memory") as caught:
        written.array("model.onnx")
    assert caught.value.where == f"{written.path}, model.onnx"


def test_altered_after_it_was_opened(written):
    opened = Bundle.open(written.path)
    members = dict(members_of(written.path))
    members["model.onnx"] = b"other"
    rezip(written.path, members.items())
    with pytest.raises(BundleError, match="altered"):
        opened.read("model.onnx")


def test_unlisted_and_missing_members(written):
    members = members_of(written.path)
    rezip(written.path, [*members, ("surprise", b"!")])
    with pytest.raises(BundleError, match=r"does not list\n.*\n  why: surprise"):
        Bundle.open(written.path)
    rezip(written.path, [member for member in members if member[0] != "model.onnx"])
    with pytest.raises(BundleError, match=r"lacks files.*\n.*\n  why: model.onnx"):
        Bundle.open(written.path)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../up", "a/../../up", "C:/x", "c:x", "a\\b", "a//b", "./a", "a/", "x\n", "x\0y"]
)
def test_unsafe_names(written, tmp_path, name):
    info = zipfile.ZipInfo("placeholder")
    info.filename = info.orig_filename = name
    rezip(written.path, [*members_of(written.path), (info, b"")])
    with pytest.raises(BundleError, match="unsafe file name"):
        Bundle.open(written.path)
    with pytest.raises(BundleError, match="unsafe file name"):
        write_bundle(tmp_path / "b.dvx", make_manifest(), {name: b""})
    assert not (tmp_path / "b.dvx").exists()


def test_an_unsafe_name_in_the_manifest(written):
    with_manifest(written.path, lambda m: m["files"].update({"../x": m["files"]["model.onnx"]}))
    with pytest.raises(BundleError, match=r"unsafe file name '../x'"):
        Bundle.open(written.path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["model.onnx", "MODEL.onnx", "Extra/plan.json"])
def test_duplicates_and_case_collisions(written, name):
    rezip(written.path, [*members_of(written.path), (name, b"")])
    with pytest.raises(BundleError, match="one name"):
        Bundle.open(written.path)


def test_links_are_refused(written):
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    rezip(written.path, [*members_of(written.path), (info, b"/etc/passwd")])
    with pytest.raises(BundleError, match="link"):
        Bundle.open(written.path)


def test_compressed_members_are_refused(written):
    rezip(written.path, members_of(written.path), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(BundleError, match="compressed"):
        Bundle.open(written.path)


def test_caps(written, monkeypatch):
    monkeypatch.setattr(bundle_module, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(BundleError, match=r"manifest.json is larger"):
        Bundle.open(written.path)
    monkeypatch.undo()
    monkeypatch.setattr(bundle_module, "MAX_TOTAL_BYTES", 50)
    with pytest.raises(BundleError, match="holds more than"):
        Bundle.open(written.path)


def test_another_zip_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"no manifest.json"):
        Bundle.open(rezip(tmp_path / "a.zip", [("readme", b"")]))


def test_a_newer_format_is_refused_before_its_keys_are_read(written):
    with_manifest(written.path, lambda m: m.update(format=3, novelty=True))
    with pytest.raises(BundleError, match=r"format 3, this dvexport reads up to 2\n.*\n  try: update"):
        Bundle.open(written.path)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda m: m.pop("target"), "target"),
        (lambda m: m.update(mode="both"), "mode"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m["inputs"][0].update(shape=[1, 0]), r"inputs\.0\.shape\.1"),
        (lambda m: m["inputs"][0]["preprocess"].update(std=[0, 1, 1]), r"inputs\.0\.preprocess.*std"),
        (lambda m: m["inputs"][0]["preprocess"].update(size="64"), r"inputs\.0\.preprocess"),
        (lambda m: m["inputs"][0]["preprocess"].update(sise=64), r"inputs\.0\.preprocess.*sise"),
        (lambda m: m["gates"][0].update(channels="64"), r"gates\.0\.channels"),
        (lambda m: m["files"]["model.onnx"].update(sha256="00"), r"files\.model\.onnx\.sha256"),
        (lambda m: m.update(format="1"), "format"),
        (lambda m: m.clear(), "format"),
    ],
)
def test_a_bad_manifest_names_the_key(written, change, key):
    with_manifest(written.path, change)
    with pytest.raises(BundleError, match=key):
        Bundle.open(written.path)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_no_json(written, raw):
    rezip(written.path, (dict(members_of(written.path)) | {MANIFEST: raw}).items())
    with pytest.raises(BundleError, match=r"manifest.json"):
        Bundle.open(written.path)


def test_reading_what_is_not_there(written, tmp_path):
    with pytest.raises(BundleError, match=r"it has: extra/plan.json"):
        written.read("model.tflite")
    bare = write_bundle(tmp_path / "bare.dvx", make_manifest(), {"model.onnx": b""})
    with pytest.raises(BundleError, match=GOLDEN):
        bare.golden()
    broken = write_bundle(tmp_path / "broken.dvx", make_manifest(), {GOLDEN: b"no tensors"})
    with pytest.raises(BundleError, match="golden data"):
        broken.golden()
