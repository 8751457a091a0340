"""The tokenizer of the built-in model: byte-level BPE, trained on a part of the training text.

Needs the engine's environment. ``train_tokenizer`` is called once per training; ``template`` is the chat
template that ends up in ``tokenizer_config.json`` and that vLLM renders.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .corpus import Conversation

VOCABULARY = 1024
CONTEXT = 2048

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, END, SYSTEM, USER, ASSISTANT)

# Conversations from which the pieces of words are counted. More would not change the pieces.
_SAMPLE = 20_000

# A developer message is a system message by its older name. The result of a tool is something said to the
# model, so it is read as a user's turn; calls without words are empty turns.
CHAT_TEMPLATE = """{{- '<|bos|>' -}}
{%- for message in messages -%}
    {%- if message['role'] in ['system', 'developer'] -%}
        {{- '<|system|>' -}}
    {%- elif message['role'] in ['user', 'tool', 'function'] -%}
        {{- '<|user|>' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|assistant|>' -}}
    {%- else -%}
        {{- raise_exception('The role of a message must be system, user or assistant, not ' ~
        message['role'] ~ '.') -}}
    {%- endif -%}
    {%- if message['content'] -%}{{- message['content'] | trim -}}{%- endif -%}
    {{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def render(conversation: Conversation) -> str:
    """Returns the conversation as the chat template writes it, or a plain text between its two marks."""
    if conversation.plain:
        return f"{BOS}{conversation.plain}{END}"
    parts = [BOS]
    if conversation.system:
        parts.append(f"{SYSTEM}{conversation.system}{END}")
    parts.extend(f"{USER}{said.strip()}{END}{ASSISTANT}{answer}{END}" for said, answer in conversation.turns)
    return "".join(parts)


def train_tokenizer(conversations: Sequence[Conversation]) -> Tokenizer:
    """Returns a tokenizer with ``VOCABULARY`` entries, its special tokens first.

    Numbers are cut into pairs of digits from the right, so that a number below a hundred is one token; a
    space is part of the word after it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,2}(?=(?:\d{2})*(?!\d))"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = conversations[:: max(1, len(conversations) // _SAMPLE)]
    # The pairs of digits are listed often enough that each becomes a token, whatever the sample holds.
    pairs = [" ".join(f"{number:02} {number}" for number in range(100))] * 500
    texts = chain((conversation.text() for conversation in sample), pairs)
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
            ),
        ]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``, the latter with the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_prefix_space": False,
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": CONTEXT,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
