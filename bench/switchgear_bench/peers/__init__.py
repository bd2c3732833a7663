"""The runtimes that `switchgear bench serve` compares: an adapter a file, loaded by worker.py in that runtime's environment."""
