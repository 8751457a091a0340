"""Some of vLLM's options."""


def make_arg_parser(parser):
    """The parser with the options that the stand-in understands."""
    parser.add_argument("--model")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--tokenizer")
    parser.add_argument("--quantization", "-q")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--uds")
    return parser
