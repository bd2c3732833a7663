"""The parts of bench/gpu_suite.py: steps within a budget, the processes they start, the build, checks by id, the benchmark.

Imports nothing that is not Python's own (but outcomes.py, which runs inside pytest): the suite says what is missing
before it needs it.
"""
