"""Checkpoints under faults: killed, full, truncated, altered, deserted."""

import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from warploom.parallel.checkpoint import (
    AsyncSaver,
    CheckpointError,
    Entry,
    commit,
    latest,
    latest_good,
    load,
    save,
    verify,
)
from warploom.parallel.checkpoint import saver as saver_module
from warploom.parallel.collectives import barrier
from warploom.parallel.mesh import Mesh
from warploom.parallel.sharding import Layout, rows, whole

_CONTEXT = multiprocessing.get_context("forkserver")
WEIGHTS = ("a", "b")


def entries(step=0, size=64):
    """Two weights whose values say the step."""
    layout = {name: whole(name, (size, 8)) for name in WEIGHTS}
    return [Entry("master", torch.full((size, 8), float(step)), layout[name]) for name in WEIGHTS]


def shares(mesh, size=64):
    """Two weights sharded by rows over all ranks."""
    start, stop = mesh.rank * size // mesh.size, (mesh.rank + 1) * size // mesh.size
    made = []
    for name in WEIGHTS:
        layout = Layout((stop - start, 8), (rows(name, (size, 8), start, stop),))
        made.append(Entry("master", torch.full(layout.shape, float(mesh.rank)), layout))
    return made


@pytest.fixture
def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_process(fn, *args, timeout=60):
    """Run `fn(*args)` in a process of its own; return its exit code."""
    process = _CONTEXT.Process(target=fn, args=args)
    process.start()
    process.join(timeout)
    assert not process.is_alive(), "the process did not end"
    return process.exitcode


def save_for_ever(folder):
    mesh, saver = Mesh.build(""), AsyncSaver(keep=2)
    path = latest(folder)
    step = 0 if path is None else load(path, entries(), mesh)["step"]
    while True:
        step += 1
        saver.start(folder, entries(step), {"step": step}, mesh)


def names_in(folder):
    """Return the names in the folder and in what is being written there."""
    return {name for _, folders, files in os.walk(folder) for name in (*folders, *files)}


@pytest.mark.parametrize("times", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_last_good_one_is_there(tmp_path, times):
    chance = random.Random(0)
    steps, kinds = [0], set()
    for _ in range(times):
        process = _CONTEXT.Process(target=save_for_ever, args=(str(tmp_path),))
        process.start()
        seen, deadline = [names_in(tmp_path)], time.monotonic() + 30
        moment = chance.randrange(1, 9)  # a save changes the names two to four times
        while len(seen) <= moment and time.monotonic() < deadline:
            if (names := names_in(tmp_path)) != seen[-1]:
                seen.append(names)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        left = [p.name for p in tmp_path.iterdir() if "." in p.name]
        kinds |= {name.split(".")[1][:3] for name in left}
        assert len(left) <= 1, left
        path = latest(tmp_path)
        if path is not None:
            verify(path)
            found = entries()
            state = load(path, found)
            assert f"step-{state['step']:08d}" == path.name
            assert all(
                torch.equal(e.tensor, torch.full((64, 8), float(state["step"]))) for e in found
            )
            assert state["step"] >= steps[-1]
            steps.append(state["step"])
    assert steps[-1] > 1
    assert "tmp" in kinds, "no kill fell into a save: the test proves nothing"


def die_at(moment, folder):
    """Save step 2 and die before the file system is touched for the `moment`-th time."""
    touched = [0]

    def count(event, arguments):
        touches = event.startswith(("os.", "shutil.")) or event == "open"
        if touches and any(str(folder) in str(a) for a in arguments):
            touched[0] += 1
            if touched[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda handle: None
    sys.addaudithook(count)
    saver = AsyncSaver(keep=1)
    saver.start(folder, entries(2), {"step": 2}, Mesh.build(""))
    saver.finish()


def test_killed_at_each_touch_of_the_disk_the_last_good_one_is_there(tmp_path):
    whole_ones = []
    for moment in range(1, 200):
        folder = tmp_path / str(moment)
        folder.mkdir()
        save(folder, entries(1), {"step": 1}, Mesh.build(""))
        code = in_process(die_at, moment, folder)
        whole_ones.append(latest(folder).name)
        verify(latest(folder))
        left = [path.name for path in folder.iterdir() if "." in path.name]
        assert len(left) <= 1, left
        if code == 0:
            break
        assert code == -signal.SIGKILL
        save(folder, entries(3), {"step": 3}, Mesh.build(""))
        assert not [path.name for path in folder.iterdir() if "." in path.name]
    assert code == 0
    assert moment > 15, "too few moments: the test proves little"
    assert whole_ones == sorted(whole_ones)
    assert {"step-00000001", "step-00000002"} == set(whole_ones)


def test_what_a_killed_save_left_goes_at_the_next_start(tmp_path):
    for name in ("step-00000004.tmp-0a1b2c3d", "step-00000001.trash-0a1b2c3d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").touch()
    for name in ("notes.tmp-1", "step-00000009.aside-00"):
        (tmp_path / name).mkdir()
    save(tmp_path, entries(), {"step": 2}, Mesh.build(""))
    assert {p.name for p in tmp_path.iterdir()} == {
        "notes.tmp-1",
        "step-00000009.aside-00",
        "step-00000002",
    }


def test_every_altered_byte_is_found(tmp_path):
    path = save(tmp_path, entries(size=8), {"step": 1, "seed": 3}, Mesh.build(""))
    verify(path)
    chance = random.Random(1)
    for file in path.iterdir():
        data = file.read_bytes()
        for at in {*chance.sample(range(len(data)), 250), 0, 7, 8, len(data) - 1}:
            changed = bytearray(data)
            changed[at] ^= 1 << chance.randrange(8)
            file.write_bytes(changed)
            with pytest.raises(CheckpointError, match=file.name):
                verify(path)
        file.write_bytes(data)
    verify(path)

    # two tensors of equal bytes change names: no block says so, the header's hash does
    file = path / "rank-00000.safetensors"
    data = file.read_bytes().replace(b"master/a@", b"master/x@")
    file.write_bytes(data.replace(b"master/b@", b"master/a@").replace(b"master/x@", b"master/b@"))
    with pytest.raises(CheckpointError, match="its header was altered"):
        verify(path)


def test_damage_is_named_and_the_last_good_one_offered(tmp_path):
    mesh = Mesh.build("")
    for step in (1, 2, 3, 4):
        path = save(tmp_path, entries(step), {"step": step}, mesh)
    file = path / "rank-00000.safetensors"
    data = file.read_bytes()

    altered = bytearray(data)
    altered[-1] ^= 64
    file.write_bytes(altered)
    with pytest.raises(CheckpointError, match=r"00000\.safetensors is damaged in tensor master/b"):
        verify(path)
    with pytest.raises(CheckpointError, match="master/b.*last good checkpoint is .*step-00000003$"):
        load(path, entries())

    file.write_bytes(data[:-100])
    with pytest.raises(
        CheckpointError,
        match=rf"truncated: it has {len(data) - 100:,} bytes, .* 1 tensors: master/b$",
    ):
        verify(path)
    file.write_bytes(data[:100])
    with pytest.raises(CheckpointError, match="truncated.* 2 tensors: master/a, master/b;.*00003$"):
        load(path, entries())

    file.unlink()
    with pytest.raises(CheckpointError, match="safetensors is missing; .* master/a, master/b"):
        verify(path)

    older = tmp_path / "step-00000003" / "index.json"
    older.write_text(older.read_text()[:-20])
    with pytest.raises(CheckpointError, match="is missing.*last good checkpoint is .*00000002$"):
        load(path, entries())
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        load(older.parent, entries())
    assert latest(tmp_path) == path
    assert latest_good(tmp_path).name == "step-00000002"
    (tmp_path / "step-00000002" / "rank-00000.safetensors").unlink()
    (tmp_path / "step-00000001" / "rank-00000.safetensors").unlink()
    assert latest_good(tmp_path) is None
    with pytest.raises(CheckpointError, match="no older checkpoint is good$"):
        load(path, entries())


def load_damaged(folder):
    mesh = Mesh.build("dp2")
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors.*00000001$"):
        load(latest(folder), shares(mesh), mesh)
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors"):
        verify(latest(folder), mesh)
    assert latest_good(folder, mesh).name == "step-00000001"


def save_twice(folder):
    mesh = Mesh.build("dp2")
    for step in (1, 2):
        save(folder, shares(mesh), {"step": step}, mesh)


def test_damage_that_one_rank_meets_stops_all(ranks, tmp_path):
    ranks(2, save_twice, str(tmp_path))
    file = tmp_path / "step-00000002" / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    ranks(2, load_damaged, str(tmp_path))


def test_a_file_that_the_disk_altered_is_found_when_read_back(tmp_path, monkeypatch):
    write_file = commit.write_file

    def faulty(path, *rest):
        result = write_file(path, *rest)
        with Path(path).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
        return result

    mesh = Mesh.build("")
    save(tmp_path, entries(), {"step": 1}, mesh)
    monkeypatch.setattr(commit, "write_file", faulty)
    with pytest.raises(RuntimeError, match="step-00000002 was not saved: .*master/b.*00000001$"):
        save(tmp_path, entries(), {"step": 2}, mesh)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


FULL = (
    r"step-00000002 was not saved: {}rank-0000{}\.safetensors needs [\d,]+ bytes, [\d,]+ are free "
    r"in .*; the last complete checkpoint is .*step-00000001"
)


def fill_the_disk(folder):
    mesh, saver = Mesh.build(""), AsyncSaver()
    saver.start(folder, entries(), {"step": 1}, mesh)
    saver.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    saver.start(folder, entries(size=1 << 12), {"step": 2}, mesh)
    with pytest.raises(RuntimeError, match=FULL.format("", 0)):
        saver.finish()
    assert [p.name for p in Path(folder).iterdir()] == ["step-00000001"]
    verify(latest(folder))
    saver.start(folder, entries(size=64), {"step": 2}, mesh)
    assert saver.finish() == latest(folder)


def test_a_write_that_fails_leaves_the_last_good_one(tmp_path):
    assert in_process(fill_the_disk, str(tmp_path)) == 0


def fill_the_disk_of_one(folder, full):
    mesh, saver = Mesh.build("dp2"), AsyncSaver()
    save(folder, shares(mesh), {"step": 1}, mesh)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mesh.rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    saver.start(folder, shares(mesh, 1 << 13), {"step": 2}, mesh)
    began = time.monotonic()
    where = "" if mesh.rank == full else f"rank {full}: "
    # the next start brings the error, to all ranks
    with pytest.raises(RuntimeError, match=FULL.format(where, full)):
        saver.start(folder, shares(mesh), {"step": 3}, mesh)
    assert time.monotonic() - began < 8
    assert [p.name for p in Path(folder).iterdir()] == ["step-00000001"]
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    saver.start(folder, shares(mesh), {"step": 3}, mesh)
    assert saver.finish() == latest(folder)


@pytest.mark.parametrize("full", [0, 1])
def test_a_write_that_fails_on_one_rank_is_known_to_all(ranks, tmp_path, full):
    ranks(2, fill_the_disk_of_one, str(tmp_path), full)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_good_one(small_disk):
    mesh = Mesh.build("")
    path = save(small_disk, entries(1, 1 << 12), {"step": 1}, mesh)
    with pytest.raises(RuntimeError, match=FULL.format("", 0)) as caught:
        save(small_disk, entries(2, 1 << 14), {"step": 2}, mesh)
    assert "No space left on device): free some space, or keep fewer" in str(caught.value)
    assert "needs 1,048," in str(caught.value)
    assert [p.name for p in small_disk.iterdir()] == ["step-00000001"]
    verify(path)
    save(small_disk, entries(2, 1 << 12), {"step": 2}, mesh)
    # not even an index fits
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
    with pytest.raises(
        RuntimeError, match=r"step-00000003 was not saved: rank-00000\.json could not"
    ):
        save(small_disk, [], {"step": 3}, mesh)
    assert latest_good(small_disk).name == "step-00000002"
    assert not list(small_disk.glob("*.tmp*"))


def fill_the_disk_together(folder, can_say):
    mesh = Mesh.build("dp2")
    save(folder, shares(mesh), {"step": 1}, mesh)
    big = Layout((1 << 15, 8), (rows("big", (1 << 15, 8), 0, 1 << 15),))
    mine = [Entry("master", torch.zeros(big.shape), big)] if mesh.rank else shares(mesh)
    if mesh.rank and not can_say:

        def refuse(path, text):
            raise OSError(28, "No space left on device", str(path))

        commit.write_text = refuse
    write_file = commit.write_file

    def second(path, *rest):
        while mesh.rank and not (path.parent / "rank-00000.json").exists():
            time.sleep(0.001)  # the other is through before the disk is full
        return write_file(path, *rest)

    commit.write_file = second
    match = FULL.format("" if mesh.rank else "rank 1: ", 1)
    if mesh.rank == 0 and not can_say:
        match = "step-00000002 was not saved: another rank failed and removed"
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=match):
        save(folder, mine, {"step": 2}, mesh)
    assert time.monotonic() - began < 8
    barrier(mesh.world)  # rank 0 removes the folder
    assert [p.name for p in Path(folder).iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("can_say", [True, False])
def test_a_disk_that_one_rank_fills_stops_all(ranks, small_disk, can_say):
    ranks(2, fill_the_disk_together, str(small_disk), can_say)


def die_while_saving(rank, port, folder, victim, answers):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    mesh, saver = Mesh.build("dp2"), AsyncSaver(patience_s=1.0)
    save(folder, shares(mesh), {"step": 1}, mesh)
    if rank == victim:
        saver_module.write_part = lambda job: os.kill(os.getpid(), signal.SIGKILL)
    saver.start(folder, shares(mesh), {"step": 2}, mesh)
    began = time.monotonic()
    try:
        saver.finish()
    except RuntimeError as error:
        answers.put((str(error), time.monotonic() - began))
    os._exit(0)  # the group's other end is gone


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_does_not_hold_the_other(tmp_path, victim, free_port):
    answers = _CONTEXT.SimpleQueue()
    both = [
        _CONTEXT.Process(
            target=die_while_saving, args=(rank, free_port, str(tmp_path), victim, answers)
        )
        for rank in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(40)
    assert both[victim].exitcode == -signal.SIGKILL
    assert both[1 - victim].exitcode == 0
    text, seconds = answers.get()
    assert text.startswith("checkpoint step-00000002 was not saved: rank")
    assert f"rank {victim} " in text
    assert text.endswith("the last complete checkpoint is " + str(tmp_path / "step-00000001"))
    assert seconds < 10
    assert latest_good(tmp_path).name == "step-00000001"
    save(tmp_path, entries(), {"step": 2}, Mesh.build(""))
    assert len(list(tmp_path.iterdir())) == 2
