"""The vLLM worker program (`pilotlight worker`): one engine, kept busy with jobs and direct requests.

It starts vLLM as a child process on a Unix socket, reports each stage of the start, takes jobs by the
worker protocol (`worker-protocol.md`), answers them from the engine (`vllm-worker.md`), and ends together
with its engine. It runs beside a Pilotlight gateway, in a container, or on RunPod itself, and imports
neither torch nor vLLM. Start reading in `program`, which wires the parts; `inputs`, `rewrite`, `batching`,
`outputs`, `sse` and `stages` are pure.
"""
