"""The parser that vLLM's is made from."""

import argparse


class FlexibleArgumentParser(argparse.ArgumentParser):
    """As the standard library's."""
