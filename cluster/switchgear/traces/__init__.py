"""Routing traces: drifting traffic, its recording, and its replay through planners and servers."""
