"""The text, the tokenizer and the training of the built-in model ``pilotlight/ember``.

``tools/train_ember.py`` is the only program that uses this package. ``facts``, ``kinds``, ``corpus`` and
``heldout`` are pure Python, so that the tests can rebuild the training text without the engine's
environment; ``training`` and ``tokenization`` need torch, transformers and tokenizers and are imported only
while training.
"""
