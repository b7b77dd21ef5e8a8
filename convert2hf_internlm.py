"""Converts an InternLM checkpoint of the InternEvo training framework into a Hugging Face folder."""

import sys
from pathlib import Path

if __package__:  # python -m huggingface_model.convert2hf_internlm, from the folder above: what it needs lies beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from weight_conversion.command_line import convert_parser, run_convert


def main() -> int:
    parser = convert_parser("convert2hf_internlm.py", "InternLM", scaling_factor=1.0, versions=True)
    return run_convert("internlm", parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
