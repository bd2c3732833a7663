"""The frontend: a sans-IO core (core.py) that owns the requests, and an ASGI app (app.py) around it."""
