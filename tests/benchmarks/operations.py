"""How many operations an update dispatches: on an accelerator each is a launch, and tensors are many.

They are counted on the CPU, with the kernels of an accelerator: ``python -m tests.benchmarks.operations`` prints the
table of ``docs/benchmarks.md``.
"""

from contextlib import nullcontext
from unittest.mock import Mock, patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ignite_ema import ModelAverage
from ignite_ema.averaging import kernels

PARAMETERS = (10, 200, 1000)
COPIED_TO_CPU = '`device="cpu"`: copies out of the GPU'

# The type of the model and the options of its average.
KINDS = {
    "float32": (torch.float32, {}),
    "float32 average of bfloat16 weights": (torch.bfloat16, {"dtype": torch.float32}),
    '`handle_buffers="update"`': (torch.float32, {"handle_buffers": "update"}),
    '`handle_buffers="statistics"`': (torch.float32, {"handle_buffers": "statistics"}),
    "`stochastic_rounding=True`": (torch.bfloat16, {"stochastic_rounding": True}),
    "`skip_nonfinite=True`": (torch.float32, {"skip_nonfinite": True}),
}

# For 200 parameters, while these were taken singly if their types differ, and buffers always.
BEFORE = {
    "float32": 3,
    "float32 average of bfloat16 weights": 402,
    '`handle_buffers="update"`': 625,
    '`handle_buffers="statistics"`': 625,
    "`stochastic_rounding=True`": 647,
    "`skip_nonfinite=True`": 7,
    COPIED_TO_CPU: 402,
}


class Count(TorchDispatchMode):
    """Counts the operations inside, and those of them that make the host wait for a number."""

    def __init__(self):
        super().__init__()
        self.operations = self.synchronisations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        self.synchronisations += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def updating(parameters, dtype, options, *, accelerated):
    """What one update dispatches: of batch norms, which have a buffer for each parameter, and some integers.

    Their number is even; ``accelerated``: with the kernels of an accelerator, not with those of a CPU.
    """
    model = nn.ModuleList(nn.BatchNorm1d(8, dtype=dtype) for _ in range(parameters // 2))
    converted = kernels._lerp_through_scratch if accelerated else kernels._lerp_converted
    with patch.object(kernels, "_lerp_converted", converted):
        average = ModelAverage(model, **options)
    average.update(0.25)  # the first makes what later ones reuse
    with Count() as count:
        average.update(0.25)
    return count


def sending(tensors):
    """What one chunk of the copies from a GPU to an average on the CPU dispatches."""
    empty = torch.empty

    def pageable(*size, pin_memory, **options):
        return empty(*size, **options)

    with patch("torch.empty", pageable), patch("torch.cuda.stream", nullcontext), Count() as count:
        kernels._send(tensors, Mock())
    return count


def counts():
    """The operations of each kind on an accelerator, for each number of :data:`PARAMETERS`."""
    found = {
        name: [updating(number, *kind, accelerated=True).operations for number in PARAMETERS]
        for name, kind in KINDS.items()
    }
    found[COPIED_TO_CPU] = [sending([torch.zeros(8)] * number).operations for number in PARAMETERS]
    return found


def markdown(found):
    """The table of the documentation."""
    header = " | ".join([*(f"{number:,} parameters" for number in PARAMETERS), "200 parameters, before"])
    rows = [f"| {kind} | {' | '.join(map(str, [*row, BEFORE[kind]]))} |" for kind, row in found.items()]
    return "\n".join([f"| | {header} |", "|---" * (len(PARAMETERS) + 2) + "|", *rows])


if __name__ == "__main__":
    print(markdown(counts()))
