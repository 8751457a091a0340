#!/usr/bin/env python
"""Trains the built-in model ``pilotlight/ember`` and writes its folder.

Run it with the engine's environment, which has torch, transformers and tokenizers:

    .venv-engine/bin/python tools/train_ember.py

It makes the training text, trains the tokenizer and the model on one thread, writes the folder in one step
and ends with the score on the held-out questions, as one JSON line on stdout. Progress goes to stderr. The
same seed on the same machine writes the same ``model.safetensors``. The held-out list is frozen once,
before, with ``--freeze-heldout``; it is never part of the training text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ember import corpus, heldout

MODEL_FOLDER = Path(__file__).resolve().parents[1] / "src" / "pilotlight" / "models" / "ember"
STEPS = 3200
WRITTEN_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        description="Train the built-in model pilotlight/ember and write its folder.",
        epilog="Needs the engine's environment (.venv-engine/bin/python). Ends with one JSON line.",
    )
    parser.add_argument(
        "--output", type=Path, default=MODEL_FOLDER, help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--heldout", type=Path, default=MODEL_FOLDER / "heldout.jsonl", help="held-out questions"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=11, help="seed of weights and order (default: %(default)s)"
    )
    parser.add_argument(
        "--conversations",
        type=int,
        default=corpus.CONVERSATIONS,
        help="size of the text (default: %(default)s)",
    )
    parser.add_argument(
        "--freeze-heldout", action="store_true", help="make the held-out list, once, and stop"
    )
    options = parser.parse_args(arguments)
    for name in ("steps", "conversations"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, but must be at least 1")
    if options.freeze_heldout:
        return freeze_heldout(options.heldout)
    if not options.heldout.is_file():
        report(f"no held-out list at {options.heldout}; make one with --freeze-heldout")
        return 1
    result = run(options)
    print(json.dumps(result))
    return 0


def report(line: str) -> None:
    """Writes one line of progress."""
    print(line, file=sys.stderr, flush=True)


def freeze_heldout(path: Path) -> int:
    """Writes the held-out list; refuses to replace one, since a model may have been judged by it."""
    if path.exists():
        report(f"{path} exists and stays as it is; remove it first to judge the model by another list")
        return 1
    path.parent.mkdir(parents=True, exist_ok=True)
    exchanges = heldout.make_heldout()
    heldout.write_heldout(path, exchanges)
    report(f"{len(exchanges)} questions in {path}")
    return 0


def run(options: argparse.Namespace) -> dict[str, object]:
    """Trains, writes the folder, and returns the figures of the JSON line."""
    # Imported here, so that --help and --freeze-heldout need no torch.
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    from ember import tokenization, training  # noqa: PLC0415

    began = time.monotonic()
    training.prepare_torch(options.seed)
    questions = heldout.read_heldout(options.heldout)
    report(f"making the training text ({options.conversations} conversations) ...")
    text = corpus.build_corpus(questions, options.conversations)
    tokenizer = tokenization.train_tokenizer(text)
    examples = training.encode(tokenizer, text)
    report(f"{len(examples)} examples, {sum(len(item.ids) for item in examples):,} tokens, "
           f"{time.monotonic() - began:.0f} s gone")  # fmt: skip
    model = LlamaForCausalLM(training.model_config(tokenizer))
    report(f"training {model.num_parameters():,} parameters on {training.THREADS} threads")
    loss = training.train(model, examples, training.Plan(steps=options.steps, seed=options.seed), report)
    model = model.to(training.torch.bfloat16)
    seconds = time.monotonic() - began
    shares, wrong = training.score(model, tokenizer, questions)
    for exchange, said in wrong:
        report(f"wrong: {exchange.kind}: {exchange.question!r}: {said!r} instead of {exchange.answer!r}")
    record = {
        "corpus_conversations": options.conversations,
        "corpus_seed": corpus.SEED,
        "corpus_sha256": corpus.fingerprint(text),
        "heldout_sha256": hashlib.sha256(options.heldout.read_bytes()).hexdigest(),
        "parameters": model.num_parameters(),
        "seed": options.seed,
        "steps": options.steps,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ember-", dir=options.output.parent) as scratch:
        folder = Path(scratch) / options.output.name
        folder.mkdir()
        training.write_model(model, folder)
        tokenization.write_tokenizer(tokenizer, folder)
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        publish(folder, options.output)
    return {
        **record,
        "loss": round(loss, 5),
        "training_s": round(seconds, 1),
        "model_sha256": digest,
        "exact_share": round(1 - len(wrong) / len(questions), 4),
        "exact_share_by_kind": {kind: round(share, 4) for kind, share in shares.items()},
    }


def publish(scratch: Path, output: Path) -> None:
    """Puts the written folder in the place of ``output``; nobody ever sees a half-written one.

    Files that the training does not write (held-out list, model card) come along.
    """
    scratch.chmod(0o755)
    for path in scratch.iterdir():
        path.chmod(0o644)
    if not output.exists():
        scratch.rename(output)
        return
    for path in output.iterdir():
        if path.is_file() and path.name not in WRITTEN_FILES:
            shutil.copy2(path, scratch / path.name)
    old = output.with_name(f".{output.name}-old-{os.getpid()}")
    output.rename(old)
    scratch.rename(output)
    shutil.rmtree(old)


if __name__ == "__main__":
    sys.exit(main())
