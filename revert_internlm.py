"""Reverts an InternLM Hugging Face folder to a checkpoint that the InternEvo training framework loads."""

import sys
from pathlib import Path

if __package__:  # python -m huggingface_model.revert_internlm, from the folder above: what it needs lies beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from weight_conversion.command_line import revert_parser, run_revert


def main() -> int:
    parser = revert_parser("revert_internlm.py", "InternLM", versions=True)
    return run_revert("internlm", parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
