"""What several test files need."""

import os

import ignite.distributed as idist
import pytest
import torch
from hypothesis import settings

# The same examples at each test run, and others every night: pytest --hypothesis-profile nightly
settings.register_profile("default", settings(deadline=None, derandomize=True, database=None))
settings.register_profile("nightly", settings(deadline=None, max_examples=2000, print_blob=True))


def pytest_terminal_summary(terminalreporter):
    """Where NO_SKIPS is set, as it is where everything is installed, a test that is skipped is an error."""
    skipped = terminalreporter.stats.get("skipped", [])
    unexpected = [report for report in skipped if "there is no CUDA device" not in str(report.longrepr)]
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
