#!/usr/bin/env python
"""Makes what the tests with a real engine serve besides the built-in model: copies of it and adapters for it.

Run it with the engine's environment, which has torch, transformers, safetensors and tokenizers:

    .venv-engine/bin/python tools/make_variants.py --output FOLDER

Quantised copies (``awq``, ``gptq``, and ``int8``, which is compressed-tensors), a copy with a temperature in
its generation configuration (``warm``), and two trained LoRA adapters (``ice``, ``fire``).
The same machine writes the same files again. Ends with one JSON line: name, bytes and seconds of each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

MODEL_FOLDER = Path(__file__).resolve().parents[1] / "src" / "pilotlight" / "models" / "ember"
MODEL = "pilotlight/ember"
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
WARM_TEMPERATURE = 0.6
SEED = 7
QUANTIZED = ("awq", "gptq", "int8")
ADAPTERS = ("ice", "fire")
NAMES = (*QUANTIZED, "warm", *ADAPTERS)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit code: 0 done, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        description="Make quantised copies of the built-in model and adapters for it.",
        epilog="Needs the engine's environment (.venv-engine/bin/python). Ends with one JSON line.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder that gets one folder per name")
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="the model (default: %(default)s)")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"what to make: {', '.join(NAMES)} (default: all)"
    )
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in NAMES:
            parser.error(f"name is {name!r}, but must be one of {', '.join(NAMES)}")
    options.output.mkdir(parents=True, exist_ok=True)
    made = {}
    for name in options.names or NAMES:
        began = time.monotonic()
        folder = options.output / name
        scratch = options.output / f".{name}-new"
        for old in (folder, scratch):
            shutil.rmtree(old, ignore_errors=True)
        scratch.mkdir()
        make(name, options.model, scratch)
        size = sum(path.stat().st_size for path in scratch.iterdir())
        scratch.rename(folder)
        made[name] = {"bytes": size, "seconds": round(time.monotonic() - began, 2)}
    print(json.dumps(made))
    return 0


def make(name: str, source: Path, target: Path) -> None:
    """Writes one variant into its folder, which exists and is empty."""
    if name in ADAPTERS:
        make_adapter(name, source, target)
        return
    for file in COPIED:
        shutil.copyfile(source / file, target / file)
    if name == "warm":
        make_warm(source, target)
        return
    # Imported here, so that --help needs no torch.
    from ember import quantization  # noqa: PLC0415

    quantization.write_quantized(source, target, quantization.METHODS[name])


def make_warm(source: Path, target: Path) -> None:
    """Writes the model as it is, with the temperature that instruct models often bring along."""
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(source / file, target / file)
    path = target / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8"))
    generation |= {"do_sample": True, "temperature": WARM_TEMPERATURE}
    path.write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_adapter(name: str, source: Path, target: Path) -> None:
    """Trains one adapter and writes it."""
    from tokenizers import Tokenizer  # noqa: PLC0415
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    from ember import adapters, training  # noqa: PLC0415

    training.prepare_torch(SEED)
    model = LlamaForCausalLM.from_pretrained(source, dtype=training.torch.float32)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tensors, loss = adapters.train_adapter(model, tokenizer, adapters.ADAPTERS[name])
    print(f"adapter {name}: loss {loss:.6f} after {adapters.STEPS} steps", file=sys.stderr, flush=True)
    adapters.write_adapter(tensors, target, MODEL)


if __name__ == "__main__":
    sys.exit(main())
