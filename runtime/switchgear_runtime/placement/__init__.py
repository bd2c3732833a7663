"""The native planner and quota solvers of csrc/placement, called by ctypes; imports no torch."""
