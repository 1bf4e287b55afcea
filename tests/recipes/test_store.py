import contextlib
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from warploom.recipes.corpus import Skips, TextSource, building, is_held_out, prepare_store
from warploom.recipes.errors import UserError
from warploom.recipes.tokens import BPE, open_store, train_bpe
from warploom.recipes.tokens.lock import one_at_a_time
from warploom.recipes.tokens.store import SplitWriter, store_dtype

RECIPE = BPE(vocabulary=300)


def write_corpus(folder, files=40):
    folder.mkdir(exist_ok=True)
    for i in range(files):
        words = " ".join(f"def f{i}(x): return x + {i * j}\n" for j in range(i % 7 + 1))
        (folder / f"m{i:02}.py").write_text(words)
    return TextSource(paths=(str(folder),), suffixes=(".py",))


@pytest.fixture
def source(tmp_path):
    return write_corpus(tmp_path / "text")


@pytest.fixture
def tokenizer():
    return train_bpe(["def f(x): return x + 1\n" * 9], BPE(vocabulary=290))


@pytest.fixture
def store(tmp_path, source):
    return prepare_store(tmp_path / "store", source, RECIPE, held_out=0.3)


def left_behind(folder):
    return sorted(p.name for p in folder.iterdir() if p.name not in ("text", "store"))


def stamp(store):
    return [(p.name, p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(store.folder.iterdir())]


def test_the_store_holds_each_document_as_the_tokenizer_frames_it(store, source):
    tokenizer = store.tokenizer
    documents = list(source.documents(Skips()))
    for split, held in ((store.train, False), (store.heldout, True)):
        chosen = [d for d in documents if is_held_out(d.key, 0.3) == held]
        assert split.documents == len(chosen) > 5
        for i, document in enumerate(chosen):
            ids = split.ids[split.offsets[i] : split.offsets[i + 1]].tolist()
            assert ids == tokenizer.document(tokenizer.encode(document.text))
        text = "".join(d.text for d in chosen).encode()
        assert split.text(tokenizer) == text
        assert split.bytes == len(text)
    assert isinstance(store.train.ids, np.memmap)
    assert store.train.ids.dtype == np.uint16
    assert store.manifest["file_types"][".py"]["documents"] == 40


def test_the_vocabulary_is_learned_from_the_training_side_alone(store, source):
    train = [d.text for d in source.documents(Skips()) if not is_held_out(d.key, 0.3)]
    assert store.tokenizer.fingerprint == train_bpe(train, RECIPE).fingerprint


def test_ids_above_65535_take_four_bytes(tmp_path):
    assert (store_dtype(65535), store_dtype(65536)) == ("<u2", "<u4")
    writer = SplitWriter(tmp_path, "train", store_dtype(128256))
    writer.add([128000, 5, 128001], 1)
    writer.close()
    assert np.fromfile(tmp_path / "train.ids.bin", "<u4").tolist() == [128000, 5, 128001]
    assert np.fromfile(tmp_path / "train.offsets.bin", "<i8").tolist() == [0, 3]


def test_no_held_out_part_when_none_is_asked_for(tmp_path, source, tokenizer):
    store = prepare_store(tmp_path / "store", source, tokenizer, held_out=0)
    assert (store.heldout.documents, len(store.heldout.ids)) == (0, 0)
    assert store.train.documents == 40


def test_the_same_text_gives_the_same_bits(tmp_path, source, store):
    again = prepare_store(tmp_path / "again", source, RECIPE, held_out=0.3)
    assert again.fingerprint == store.fingerprint
    assert again.manifest == store.manifest


def test_an_identical_build_is_reused(source, store):
    before = stamp(store)
    again = prepare_store(store.folder, source, RECIPE, held_out=0.3)
    assert stamp(store) == before
    given = prepare_store(store.folder, source, store.tokenizer, held_out=0.3)
    assert stamp(store) == before
    assert again.fingerprint == given.fingerprint == store.fingerprint


def test_a_touched_file_with_the_same_text_is_reused(source, store, tmp_path):
    os.utime(tmp_path / "text" / "m03.py", (1, 1))
    bits = (store.folder / "train.ids.bin").stat().st_ino
    again = prepare_store(store.folder, source, RECIPE, held_out=0.3)
    assert (store.folder / "train.ids.bin").stat().st_ino == bits
    assert again.manifest["listing"] != store.manifest["listing"]
    assert prepare_store(store.folder, source, RECIPE, held_out=0.3).manifest == again.manifest


@pytest.mark.parametrize("change", ["grown", "same size", "removed", "added"])
def test_changed_text_is_refused_or_rebuilt_never_stale(source, store, tmp_path, change):
    path = tmp_path / "text" / "m03.py"
    if change == "grown":
        path.write_text(path.read_text() + "y")
    elif change == "same size":
        path.write_text(path.read_text().replace("x", "y"))
    elif change == "removed":
        path.unlink()
    else:
        (tmp_path / "text" / "new.py").write_text("new = 1")
    before = stamp(store)
    with pytest.raises(UserError, match=r"was built from other text \(40 documents, .*; now"):
        prepare_store(store.folder, source, RECIPE, held_out=0.3)
    assert stamp(store) == before
    new = prepare_store(store.folder, source, RECIPE, held_out=0.3, changed="rebuild")
    assert new.fingerprint != store.fingerprint
    assert new.manifest["content"] != store.manifest["content"]
    assert left_behind(tmp_path) == [".store.lock"]


def test_other_settings_are_refused_by_name(source, store, tokenizer):
    for recipe, share, words in (
        (BPE(vocabulary=301), 0.3, "another tokenizer recipe"),
        (BPE(vocabulary=300, digits="one"), 0.3, "another tokenizer recipe"),
        (tokenizer, 0.3, "another tokenizer"),
        (RECIPE, 0.2, r"another held-out share \(0.3, asked for 0.2\)"),
    ):
        with pytest.raises(UserError, match=f"was built from {words}"):
            prepare_store(store.folder, source, recipe, held_out=share)


def test_another_tokenizer_is_refused_at_opening(store, tokenizer):
    open_store(store.folder, tokenizer=store.tokenizer)
    with pytest.raises(UserError, match=r"was built with tokenizer .* \(300 ids\), the given one"):
        open_store(store.folder, tokenizer=tokenizer)


def test_a_tokenizer_folder_that_was_edited_is_seen(store, tokenizer):
    tokenizer.save(store.folder / "tokenizer")
    with pytest.raises(UserError, match="its tokenizer folder was changed after the build"):
        _ = open_store(store.folder).tokenizer


@pytest.mark.parametrize("name", ["train.ids.bin", "heldout.ids.bin", "train.offsets.bin"])
def test_a_flipped_bit_is_named(store, source, name):
    data = bytearray((store.folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (store.folder / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} was changed after the build"):
        open_store(store.folder)
    with pytest.raises(UserError, match=f"{name} was changed after the build"):
        prepare_store(store.folder, source, RECIPE, held_out=0.3)
    open_store(store.folder, verify=False)
    good = prepare_store(store.folder, source, RECIPE, held_out=0.3, changed="rebuild")
    assert good.fingerprint == store.fingerprint


def test_a_cut_or_missing_file_is_named_without_hashing(store):
    path = store.folder / "train.ids.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    with pytest.raises(UserError, match=f"must have {len(data)} bytes, it has {len(data) - 2}"):
        open_store(store.folder, verify=False)
    path.unlink()
    with pytest.raises(UserError, match=r"train\.ids\.bin is missing"):
        open_store(store.folder, verify=False)


def test_a_manifest_that_cannot_be_read_is_named(store, tmp_path):
    path = store.folder / "manifest.json"
    path.write_text(json.dumps({**store.manifest, "version": 99}))
    with pytest.raises(UserError, match="has format 99, this release reads 1"):
        open_store(store.folder)
    path.write_text('{"ver')
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_store(store.folder)
    with pytest.raises(UserError, match=r"must hold manifest\.json; there is none"):
        open_store(tmp_path)


def test_a_folder_with_other_files_is_never_replaced(tmp_path, source):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for changed in ("refuse", "rebuild"):
        with pytest.raises(UserError, match="must be a token store, empty, or new"):
            prepare_store(tmp_path / "mine", source, RECIPE, changed=changed)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_is_filled(tmp_path, source, tokenizer):
    (tmp_path / "store").mkdir()
    assert prepare_store(tmp_path / "store", source, tokenizer).train.documents
    assert left_behind(tmp_path) == [".store.lock"]


def test_a_store_may_not_lie_in_its_own_text(tmp_path, source, tokenizer):
    everything = TextSource(paths=(str(tmp_path),))
    with pytest.raises(UserError, match="must not lie in its own text"):
        prepare_store(tmp_path / "runs" / "store", everything, tokenizer)
    python = TextSource(paths=(str(tmp_path),), suffixes=(".py",))
    assert prepare_store(tmp_path / "runs" / "store", python, tokenizer).train.documents


def test_both_sides_must_get_a_document(tmp_path):
    (tmp_path / "one.txt").write_text("only one file\n")
    source = TextSource(paths=(str(tmp_path / "one.txt"),))
    tokenizer = train_bpe(["aa"], BPE(vocabulary=280))
    with pytest.raises(UserError, match=r"held_out=0\.05 gave 1 to train and 0 held out"):
        prepare_store(tmp_path / "store", source, tokenizer)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [], "nothing is left"
    assert prepare_store(tmp_path / "store", source, tokenizer, held_out=0).train.documents == 1


FORKSERVER = multiprocessing.get_context("forkserver")  # conftest preloads torch there


def in_a_process(fn, *args):
    process = FORKSERVER.Process(target=fn, args=args, daemon=True)
    process.start()
    return process


def build(folder, **options):
    source = TextSource(paths=(str(folder / "text"),), suffixes=(".py",))
    return prepare_store(folder / "store", source, RECIPE, held_out=0.3, **options)


def kill_self(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_ids_are_written(folder):
    add, count = SplitWriter.add, []

    def die(self, ids, size):
        add(self, ids, size)
        count.append(1)
        if len(count) == 20:
            kill_self()

    SplitWriter.add = die
    build(folder)


def killed_before_the_manifest(folder):
    building.write_json = kill_self
    build(folder)


def killed_before_the_rename(folder):
    Path.rename = kill_self
    build(folder)


@pytest.mark.parametrize(
    "builder", [killed_while_ids_are_written, killed_before_the_manifest, killed_before_the_rename]
)
def test_a_killed_build_leaves_nothing_that_looks_whole(tmp_path, source, builder):
    killed = in_a_process(builder, tmp_path)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert not (tmp_path / "store").exists()
    assert left_behind(tmp_path) == [".store.lock", ".store.partial"]
    store = build(tmp_path, wait_s=5)
    assert store.train.documents + store.heldout.documents == 40
    assert left_behind(tmp_path) == [".store.lock"]


def rebuild_killed_between_its_renames(folder):
    rename, count = Path.rename, []

    def die(self, target):
        count.append(1)
        if len(count) == 2:
            kill_self()
        return rename(self, target)

    Path.rename = die
    build(folder, changed="rebuild")


def test_a_rebuild_killed_between_its_renames_brings_the_old_store_back(tmp_path, source, store):
    (tmp_path / "text" / "m03.py").write_text("other = 1\n")
    killed = in_a_process(rebuild_killed_between_its_renames, tmp_path)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert not store.folder.exists()
    with pytest.raises(UserError, match="was built from other text"):
        build(tmp_path)
    assert open_store(store.folder).fingerprint == store.fingerprint
    assert left_behind(tmp_path) == [".store.lock"]


def build_and_tell(folder, queue):
    built = []
    replace = building.replacing
    building.replacing = lambda target: built.append(1) or replace(target)
    queue.put((build(folder).fingerprint, len(built)))


def test_processes_that_build_at_once_build_once(tmp_path, source):
    queue = FORKSERVER.SimpleQueue()
    builders = [in_a_process(build_and_tell, tmp_path, queue) for _ in range(3)]
    for builder in builders:
        builder.join(60)
    assert [builder.exitcode for builder in builders] == [0, 0, 0]
    prints, built = zip(*(queue.get() for _ in builders), strict=True)
    assert len(set(prints)) == 1
    assert sum(built) == 1


def hold(path, queue):
    with one_at_a_time(path, wait_s=0, what="x"):
        queue.put("in")
        time.sleep(60)


def test_a_waiter_gives_up_and_names_who_holds_the_lock(tmp_path):
    queue = FORKSERVER.SimpleQueue()
    holder = in_a_process(hold, tmp_path / "lock", queue)
    queue.get()
    with (
        pytest.raises(RuntimeError, match=rf"store y: process {holder.pid} on .* for 0\.2 s"),
        one_at_a_time(tmp_path / "lock", wait_s=0.2, what="store y"),
    ):
        pass
    holder.kill()
    with one_at_a_time(tmp_path / "lock", wait_s=10, what="store y"):  # the dead let go
        holder.join(10)
    assert holder.exitcode == -signal.SIGKILL


def build_on_a_full_disk(folder, queue):
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # writes past it fail
    try:
        build(folder)
    except RuntimeError as error:
        queue.put(str(error))


def test_a_disk_that_fills_up_is_said_and_nothing_is_left(tmp_path, source):
    (tmp_path / "text" / "large.py").write_text("def f(x): return x + 1\n" * 20_000)
    queue = FORKSERVER.SimpleQueue()
    full = in_a_process(build_on_a_full_disk, tmp_path, queue)
    full.join(60)
    assert not queue.empty()
    assert "cannot be written (File too large)" in queue.get()
    assert left_behind(tmp_path) == [".store.lock"]
    assert not (tmp_path / "store").exists()


def test_the_hashes_are_those_of_the_files(store):
    for split in store.manifest["splits"].values():
        for entry in split["files"].values():
            data = (store.folder / entry["name"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == entry["sha256"]


def test_an_open_store_outlives_its_replacement(tmp_path, source, store):
    """A run that has the store mapped goes on reading what it opened."""
    before = store.train.ids.copy()
    (tmp_path / "text" / "m03.py").write_text("other = 1\n")
    prepare_store(store.folder, source, RECIPE, held_out=0.3, changed="rebuild")
    np.testing.assert_array_equal(store.train.ids, before)


def test_skipped_files_are_in_the_manifest_and_the_log(tmp_path, source, tokenizer, caplog):
    (tmp_path / "text" / "z.py").write_bytes(b"caf\xe9")
    (tmp_path / "text" / "zz.py").write_bytes(b"a\0b")
    with caplog.at_level("WARNING"):
        store = prepare_store(tmp_path / "store", source, tokenizer)
    assert store.manifest["skipped"] == {"binary": 1, "not UTF-8": 1}
    assert "skipped 1 binary (zz.py); 1 not UTF-8 (z.py)" in caplog.text
    with contextlib.suppress(UserError):
        prepare_store(tmp_path / "new", TextSource(paths=(str(tmp_path / "none"),)), tokenizer)
    assert not (tmp_path / "new").exists()
