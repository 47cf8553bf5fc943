"""What several test files need."""

import os

import ignite.distributed as idist
import pytest
import torch
from hypothesis import settings

from tests.helpers import documents

# The same examples at each test run, and others every night: pytest --hypothesis-profile nightly
settings.register_profile("default", settings(deadline=None, derandomize=True, database=None))
settings.register_profile("nightly", settings(deadline=None, max_examples=2000, print_blob=True))

# Reasons to skip that no installation can remove.
UNAVOIDABLE = (
    "there is no CUDA device",
    "this torch gathers no weights on a CPU",
    "a defect of pytorch-ignite 0.5.5",
    "torch writes such a file, and cannot read it",
    "of torch 2.6",
)


def pytest_configure(config):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the workers, which would wait for each other's threads
    config.pluginmanager.register(documents, "documents")
    # Our own warnings are errors; those of a newer version of another package are not.
    config.addinivalue_line("filterwarnings", "error::ignite_ema.EMAWarning")
    # Most runs here are a few updates long, and most of their average is its start. That warning has its own tests.
    config.addinivalue_line("filterwarnings", "ignore:After .* of the average of .* is still:ignite_ema.EMAWarning")


def pytest_terminal_summary(terminalreporter):
    """With NO_SKIPS set, as it is if everything is installed, a skipped test is an error."""
    skipped = terminalreporter.stats.get("skipped", [])
    unexpected = [report for report in skipped if not any(text in str(report.longrepr) for text in UNAVOIDABLE)]
    if unexpected and os.environ.get("NO_SKIPS"):
        for report in unexpected:
            terminalreporter.write_line(f"skipped, which should not be: {report.nodeid}: {report.longrepr}", red=True)
        pytest.exit("tests were skipped", returncode=1)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """A process group of this process alone; the file makes tests in parallel strangers to each other."""
    path = tmp_path_factory.mktemp("group") / "file"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # or ignite.distributed warns that it has to guess
        torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
        yield
        idist.finalize()  # ignite.distributed would go on asking for the group
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
