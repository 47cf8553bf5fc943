"""What averages cost and how exact they are: ``python -m tests.benchmarks`` measures them against other libraries."""

import os

# Before torch is imported, or its profiler tells of each start and of memory that was there before.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
