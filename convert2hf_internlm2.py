"""Converts an InternLM2 checkpoint of the InternEvo training framework into a Hugging Face folder."""

import sys
from pathlib import Path

if __package__:  # python -m huggingface_model.convert2hf_internlm2, from the folder above: what it needs lies beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from weight_conversion.command_line import convert_parser, run_convert


def main() -> int:
    parser = convert_parser("convert2hf_internlm2.py", "InternLM2", scaling_factor=2.0, versions=False)
    return run_convert("internlm2", parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
