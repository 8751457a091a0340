"""What Pilotlight adds to an engine's Python: one that has imported vLLM, and engines forked from it.

Needs vLLM and nothing else, and never imports Pilotlight. It is not installed: its folder goes to the front
of PYTHONPATH, with metadata beside it by which vLLM finds its platform plugin.
"""
