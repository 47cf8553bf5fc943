"""What an update costs: ``python -m tests.benchmarks`` measures it against other libraries and against one `lerp_`."""
