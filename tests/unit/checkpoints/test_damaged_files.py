"""Files of every system, damaged at random: read, or refused in one sentence, in a moment and in little memory."""

import io
import pickletools
import random
import resource
import time
import zipfile
from pathlib import Path

import pytest
import torch

from ignite_ema.checkpoints import read
from tests.helpers.peer_files import MAKERS, ignite_ema, made, mmagic, mmcv, nested

OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def flip(content, rng):
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 30])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def repeat(content, rng):
    start, target = rng.randrange(len(content)), rng.randrange(len(content))
    return content[:target] + content[start : start + rng.randrange(200)] + content[target:]


def blank(content, rng):
    start = rng.randrange(len(content))
    length = rng.randrange(1, 100)
    return content[:start] + bytes([rng.choice([0, 255])]) * length + content[start + length :]


def insert(content, rng):
    """Opcodes of a pickle."""
    target = rng.randrange(len(content))
    return content[:target] + b"".join(rng.choices(OPCODES, k=rng.choice([1, 2, 5]))) + content[target:]


WAYS = [cut, flip, repeat, blank, insert]


def damaged(content, rng):
    """The file with a part of it damaged; half of the archives are whole ones around a damaged entry."""
    if not zipfile.is_zipfile(io.BytesIO(content)) or rng.random() < 0.3:
        return rng.choice(WAYS)(content, rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        names = old.namelist()
        pickled = next(name for name in names if name.endswith("data.pkl"))
        target = pickled if rng.random() < 0.8 else rng.choice(names)
        for name in names:
            entry = old.read(name)
            new.writestr(name, rng.choice(WAYS)(entry, rng) if name == target and entry else entry)
    return buffer.getvalue()


def sources(makers):
    """The files of the systems that can be written here, in both formats of torch."""
    found = []
    for maker in makers:
        try:
            peer = made(maker)
        except pytest.skip.Exception:
            continue
        found.append((peer.path.read_bytes(), peer))
        legacy = io.BytesIO()
        content = torch.load(peer.path, weights_only=False)
        torch.save(content, legacy, _use_new_zipfile_serialization=False)
        found.append((legacy.getvalue(), peer))
    return found


def check(path, peer):
    """Reads a file, or sees it refused; returns the seconds."""
    start, said = time.perf_counter(), ""
    try:
        assert repr(read(path, key=peer.key, names=peer.names)).startswith("Averaged(")
    except UnicodeDecodeError:
        raise
    except (TypeError, ValueError) as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 2500
    return time.perf_counter() - start


def run(count, makers, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng, all_sources, slowest = random.Random(0), sources(makers), 0.0
    for _ in range(count):
        whole, peer = rng.choice(all_sources)
        path = Path(tmp_path / "file.pt")
        path.write_bytes(damaged(whole, rng))
        slowest = max(slowest, check(path, peer))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{count} files, slowest {slowest:.2f} s, {grown / 1024:.0f} MiB more")
    assert slowest < 2
    assert grown < 1024 * 1024


def test_damaged_files_are_read_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(150, [nested, ignite_ema, mmcv, mmagic], tmp_path)


@pytest.mark.slow
def test_ten_thousand_damaged_files_are_read_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(10_000, MAKERS, tmp_path)
