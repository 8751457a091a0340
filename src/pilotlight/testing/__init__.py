"""Public fakes for tests: ours and those of people who build on Pilotlight.

`fake_engine` is a small program that stands in for vLLM and misbehaves on request; `protocol_server` is a
minimal platform for a worker program, written from the worker protocol alone; `receiver` takes webhooks.
"""
