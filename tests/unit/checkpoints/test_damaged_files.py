"""Files of every system, damaged at random: what is read is what was written, or it is refused in one sentence."""

import io
import random

import pytest
import torch

from ignite_ema.checkpoints import read
from tests.helpers.peer_files import MAKERS, equal, ignite_ema, made, mmagic, mmcv, nested


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def flip(content, rng):
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 30])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def blank(content, rng):
    start = rng.randrange(len(content))
    length = rng.randrange(1, 100)
    return content[:start] + bytes([rng.choice([0, 255])]) * length + content[start + length :]


def sources(makers):
    """The files of the systems that can be written here, in both formats of torch, and whether there are checksums."""
    for maker in makers:
        try:
            peer = made(maker)
        except pytest.skip.Exception:
            continue
        yield peer.path.read_bytes(), peer, True
        legacy = io.BytesIO()
        torch.save(torch.load(peer.path, weights_only=False), legacy, _use_new_zipfile_serialization=False)
        yield legacy.getvalue(), peer, False


@pytest.mark.parametrize(
    ("count", "makers"),
    [(150, [nested, ignite_ema, mmcv, mmagic]), pytest.param(10_000, MAKERS, marks=pytest.mark.slow)],
    ids=["some", "many"],
)
def test_damaged_files_are_read_or_refused(count, makers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, all_sources, path = random.Random(0), list(sources(makers)), tmp_path / "file.pt"
    for _ in range(count):
        whole, peer, has_checksums = rng.choice(all_sources)
        path.write_bytes(rng.choice([cut, flip, blank])(whole, rng))
        try:
            found = read(path, key=peer.key, names=peer.names)
        except (TypeError, ValueError) as error:
            said = str(error)
            assert "\n" not in said
            assert len(said) < 2500
        else:
            assert not has_checksums or equal(found.tensors, peer.tensors)
