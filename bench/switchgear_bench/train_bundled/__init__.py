"""Makes a small MoE model like the bundled one: `python -m switchgear_bench.train_bundled OUT` (see __main__.py)."""
