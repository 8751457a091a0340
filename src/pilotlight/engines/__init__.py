"""Engines: everything that knows vLLM, behind small doors.

`install` builds the engine's own virtual environment, `probe` runs inside it and writes down what that vLLM
understands, `manifest` reads this back. None of the three needs anything beyond the standard library, so they
work before Pilotlight's own dependencies are there.
"""
