"""Moments of a start, from lines that vLLM 0.32 really printed."""

from __future__ import annotations

from pilotlight.worker.timeline import LAUNCHED, READY, Timeline

EAGER = """\
(APIServer pid=1) INFO 11-29 21:15:21 [api_utils.py:347]
(APIServer pid=1) INFO 11-29 21:15:21 [api_utils.py:347]  ▄▄ ▄█ █     █     █ ▀▄▀ █  version 0.32.0
(APIServer pid=1) INFO 11-29 21:15:21 [api_utils.py:286] non-default args: {'uds': '/e.sock'}
(APIServer pid=1) INFO 11-29 21:15:21 [model.py:733] Resolved architecture: LlamaForCausalLM
(APIServer pid=1) WARNING 11-29 21:15:21 [vllm.py:1703] Enforce eager set, disabling torch.compile, CUDAGraphs
(APIServer pid=1) WARNING 11-29 21:15:21 [vllm.py:1727] Inductor compilation was disabled by user settings
(EngineCore pid=2) INFO 11-29 21:15:21 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: x
(Worker pid=3) INFO 11-29 21:15:21 [cpu_model_runner.py:68] Starting to load model /m...
Loading safetensors checkpoint shards: 100% Completed | 1/1 [00:00<00:00, 126.94it/s]
(Worker pid=3) INFO 11-29 21:15:21 [default_loader.py:501] Loading weights took 0.01 seconds
(EngineCore pid=2) INFO 11-29 21:15:21 [utils.py:347] Using LBHNC KV cache layout.
(Worker pid=3) INFO 11-29 21:15:21 [cpu_worker.py:260] Explicitly set (0.06/17.46) GiB for KV cache on node 0.
(EngineCore pid=2) INFO 11-29 21:15:21 [kv_cache_utils.py:2327] CPU KV cache size: 26,112 tokens
(APIServer pid=1) INFO 11-29 21:15:22 [entry.py:140] Starting vLLM server on unix:/e.sock
""".splitlines()

COMPILED = """\
(Worker pid=3) INFO 11-29 21:15:21 [cpu_model_runner.py:87] Warming up model for the compilation...
(Worker pid=3) INFO 11-29 21:15:24 [backends.py:1166] Dynamo bytecode transform time: 2.10 s
(Worker pid=3) INFO 11-29 21:15:24 [backends.py:399] Compiling a graph for compile range (1, 2048) takes 9.01 s
""".splitlines()


def test_a_real_start_is_told_by_the_moments_of_its_stages() -> None:
    timeline = Timeline()
    timeline.note(LAUNCHED, 90)
    for moment, line in enumerate(EAGER, start=100):
        timeline.read(line, moment)
    timeline.note(READY, 200)
    assert timeline.rows() == [
        ("launched", 90),
        ("config", 101),
        ("loading_weights", 107),
        ("kv_cache", 109),
        ("ready", 200),
    ]


def test_only_what_compiles_has_that_stage() -> None:
    timeline = Timeline()
    for moment, line in enumerate(COMPILED, start=100):
        timeline.read(line, moment)
    assert timeline.rows() == [("compiling", 100)]


def test_the_first_word_counts_and_moments_are_in_order() -> None:
    timeline = Timeline()
    timeline.note(READY, 9)
    timeline.note(LAUNCHED, 5)
    timeline.note(READY, 1)
    assert timeline.rows() == [("launched", 5), ("ready", 9)]
