"""Engines: a bundle compiled for one runtime, with a manifest beside it. Free of heavy imports: a worker loads it."""
