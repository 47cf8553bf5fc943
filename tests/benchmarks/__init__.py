"""What averages cost and how exact they are: ``python -m tests.benchmarks`` measures them against other libraries."""
