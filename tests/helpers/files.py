"""Files that tests look for, states that went through one, and one that runs what it likes."""

import io
import pickle
from contextlib import contextmanager

import torch


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def newest(folder):
    """The checkpoint of the latest iteration, None if there is none."""
    saved = sorted(folder.glob("checkpoint_*.pt"), key=lambda path: int(path.stem.split("_")[1]))
    return saved[-1] if saved else None


def reloaded(state):
    """Through a file's bytes and back, with nothing but plain values."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@contextmanager
def changed_contents(path):
    """The table of contents of a sharded checkpoint, written back at the end."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    yield metadata
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


class Evil:
    """Calls something, which leaves a trace, where it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call
