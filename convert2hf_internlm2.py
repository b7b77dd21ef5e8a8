"""Converts an InternLM2 checkpoint of the InternEvo training framework into a Hugging Face folder."""

import sys

from weight_conversion.command_line import convert_parser, run_convert


def main() -> int:
    parser = convert_parser("convert2hf_internlm2.py", "InternLM2", scaling_factor=2.0, versions=False)
    return run_convert("internlm2", parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
