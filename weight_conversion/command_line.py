"""What the four scripts share on the command line. Imports nothing heavy: `--help` answers at once."""

from __future__ import annotations

import argparse
import errno
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import PROJECT, __version__
from .errors import ConversionError
from .printing import say
from .signals import EndedBySignal, raised_once

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

NOTHING_WRITTEN = "Nothing was written under --tgt"
ADVICE = {
    errno.EMFILE: "raise the limit on open files (ulimit -n).",
    errno.EIO: "check the disk of this file, and copy the file again.",
    errno.ENOMEM: "raise the limit on memory (ulimit -v), or end other programs.",
    errno.ENOSPC: "make room on its disk and run again.",
    errno.EDQUOT: "your quota on its disk is used up.",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f).",
    errno.EROFS: "choose one on a disk that can be written.",
    errno.EACCES: "check the permissions.",
}
"""What a sentence on an error of the system goes on with, by its number, after NOTHING_WRITTEN."""
ADVICE_TO_CONVERT = {errno.EFBIG: "raise the limit on file sizes (ulimit -f) or lower --max_shard."}

ADDRESS_SPACE_NEEDED = 200 << 20
"""What the libraries reserve, most of it never used: 166 MB, and some for the threads."""

DTYPES = ("float16", "bfloat16", "float32")

MAX_POS = "max_position_embeddings of the model (the length it was trained with; not taken from the checkpoint)"


class Parser(argparse.ArgumentParser):
    """argparse that ends its error messages with an example of the right call.

    `--version` as the only argument prints the project's version; among others it is InternLM's, with a value.
    """

    def __init__(self, script: str, description: str, example: str) -> None:
        """`example` are the words after the command, which is called as this one was."""
        program = _called(script)
        self._example = f"{'python ' if program.endswith('.py') else ''}{program} {example}"
        super().__init__(
            prog=program,
            description=f"{description}\n\n{PROJECT} {__version__}; --version alone prints this.",
            epilog=f"example:\n  {self._example}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self._dependents: list[_Dependent] = []

    def add_dependent(self, dependent: _Dependent, **choices: Any) -> None:
        """A flag that says nothing without another, which its help says; its default is known after parsing."""
        self._dependents.append(dependent)
        choices["help"] = f"{choices['help']} (default: {dependent.default})"
        self.add_argument(dependent.flag, **choices)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        if words == ["--version"]:
            say(f"{PROJECT} {__version__}")
            self.exit()
        found = super().parse_args(words, namespace)
        for dependent in self._dependents:
            name = dependent.flag.removeprefix("--")
            if getattr(found, name) is None:
                setattr(found, name, dependent.default)
            elif not dependent.matters(found):
                sentence = f"{dependent.flag} says nothing without {dependent.needed}"
                if dependent.refused:
                    self.error(f"argument {sentence}: give that too, or leave it out")
                say(f"warning: {sentence}: it has no effect.", to_errors=True)
        return found

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}\nexample: {self._example}\n")

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if message:
            say(message.removesuffix("\n"), to_errors=file is sys.stderr)


@dataclass(frozen=True)
class _Dependent:
    """A flag that matters with another one, `needed`, only; given without it, it is refused or warned of."""

    flag: str
    default: Any
    needed: str
    matters: Callable[[argparse.Namespace], bool]
    refused: bool


def _called(script: str) -> str:
    """What this program was called as: by its file, as an installed command, or as a module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name if spec else ""
    return f"python -m {module}" if module.rpartition(".")[2] == Path(script).stem else Path(sys.argv[0]).name


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults of flags that have one, keeps the example's line."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.required or action.default is None else super()._get_help_string(action)


def file_name(text: str) -> Path:
    """A name of a file or folder; the empty one, as of an unset variable, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty (an unset variable?)")
    return Path(text)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def size(text: str) -> int:
    """A number of bytes with its unit: 10GB, 500MB, 1.5 TB."""
    number, unit = text[:-2].strip(), text[-2:].upper()
    try:
        found = int(float(number) * 10 ** UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 10GB or 500MB")
    return found


UNITS = {"KB": 3, "MB": 6, "GB": 9, "TB": 12}
"""Powers of ten, as max_shard_size of transformers takes them."""


def factor(text: str) -> float:
    """A number from 1.0 on."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1.0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1.0")
    return number


def convert_parser(script: str, family: str, scaling_factor: float, *, versions: bool) -> Parser:
    """The parser of a convert2hf script. `versions`: MLP generations to choose from."""
    own = family.lower()
    parser = Parser(
        script,
        f"Convert an {family} checkpoint of the InternEvo training framework (model_tp*_pp*.pt, model_config.pt) "
        "into a Hugging Face folder.",
        f"--src ckpt/1000 --tgt hf_{own} --tokenizer tokenizer.model",
    )
    add = parser.add_argument
    add("--src", type=file_name, required=True, help="folder with the InternEvo shards")
    add("--tgt", type=file_name, required=True, help="Hugging Face folder to write")
    add(
        "--tokenizer",
        type=file_name,
        required=True,
        help="SentencePiece model (tokenizer.model), or a folder with one",
    )
    add(
        "--format",
        choices=(own, "llama"),
        default=own,
        help="model class of the folder: the family's own, with its code beside the weights, or transformers' Llama, "
        "without remote code",
    )
    add("--dtype", choices=DTYPES, default="bfloat16", help="type of the weights that are written")
    add("--max_shard", type=size, default="10GB", help="largest size of one weight file, for example 10GB or 500MB")
    add("--max_pos", type=positive, default=4096, help=MAX_POS)
    add(
        "--rotary_type",
        choices=("origin", "dynamic"),
        default="origin",
        help="rotary embedding: as trained, or dynamic NTK",
    )
    dynamic = _Dependent(
        "--scaling_factor",
        scaling_factor,
        "--rotary_type dynamic",
        lambda arguments: arguments.rotary_type == "dynamic",
        refused=False,
    )
    parser.add_dependent(dynamic, type=factor, help="scaling factor of dynamic NTK, with it only")
    if versions:
        add("--version", type=int, choices=(1, 2), help="where the MLP is square: 1 = up is w2, 2 = up is w3")
    add(
        "--config",
        type=file_name,
        help="where training ran on a Hugging Face class: its config.json, or a folder with one",
    )
    add(
        "--norm_head",
        choices=("normalized", "raw"),
        help="where norm_head is set: how training used the output weight (InternEvo 0.5.1 and 0.5.2: raw)",
    )
    add(
        "--chat",
        action="store_true",
        help="declare the chat tokens, the chat template and the end-of-turn token",
    )
    _add_common(parser)
    return parser


def revert_parser(script: str, family: str, *, versions: bool) -> Parser:
    """The parser of a revert script. `versions`: MLP generations to choose from."""
    parser = Parser(
        script,
        f"Revert an {family} Hugging Face folder, or shards of another layout, to a checkpoint that InternEvo loads.",
        f"--src hf_{family.lower()} --tgt ckpt_tp8 --tp_size 8 --embed_split --use_flash",
    )
    add = parser.add_argument
    add("--src", type=file_name, required=True, help="Hugging Face folder, or folder with InternEvo shards")
    add("--tgt", type=file_name, required=True, help="folder to write the shards to")
    add("--tp_size", type=positive, required=True, help="tensor-parallel size: ranks that share a layer")
    add("--pp_size", type=positive, default=1, help="pipeline size: stages that share the layers")
    add("--num_chunks", type=positive, default=1, help="chunks of an interleaved pipeline")
    add("--wp_size", type=positive, help="weight-parallel size of an isp run; without it the run is not isp")
    isp = _Dependent("--isp", 2024, "--wp_size", lambda arguments: arguments.wp_size is not None, refused=True)
    parser.add_dependent(
        isp,
        type=int,
        choices=(2024, 2025),
        help="files of isp: 2024 = model_tp*_wp*_pp*.pt, 2025 = model_wp*_pp*.pt; with --wp_size only",
    )
    add(
        "--mlp_layer_fusion",
        action="store_true",
        help="the run has mlp_layer_fusion=True, with which isp cuts gate and up as one",
    )
    if versions:
        add(
            "--version",
            type=int,
            choices=(1, 2),
            default=2,
            help="MLP names: 1 = up is w2, down is w3; 2 = up is w3, down is w2",
        )
    add(
        "--embed_split",
        action="store_true",
        help="split the embedding along the hidden size, not the vocabulary",
    )
    add("--use_flash", action="store_true", help="set use_flash_attn in model_config.pt")
    add("--safetensors", action="store_true", help="read safetensors even where there are .bin files")
    _add_common(parser)
    return parser


def _add_common(parser: Parser) -> None:
    parser.add_argument("--force", action="store_true", help="replace --tgt, at the end, where it holds a model")
    parser.add_argument("--verify", action="store_true", help="check checksums before, and compare every tensor after")


def run_convert(family: str, arguments: argparse.Namespace) -> int:
    """Converts as the user asked; the exit status."""

    def action() -> None:
        from .mapping.families import FAMILIES
        from .running.meanwhile import Meanwhile
        from .tokenizer.prepared import prepare_tokenizer

        spec = FAMILIES[family].forms[arguments.format].tokenizer
        prepare = partial(prepare_tokenizer, arguments.tokenizer, spec, arguments.chat)
        with Meanwhile(prepare) as tokenizer:  # before numpy is imported, which starts threads
            from .files.dtypes import BY_NAME
            from .running.convert import ConvertRequest, convert
            from .running.reporting import Reporter

            request = ConvertRequest(
                source=arguments.src,
                target=arguments.tgt,
                tokenizer=arguments.tokenizer,
                format=arguments.format,
                dtype=BY_NAME[arguments.dtype],
                max_shard=arguments.max_shard,
                max_position_embeddings=arguments.max_pos,
                dynamic_factor=arguments.scaling_factor if arguments.rotary_type == "dynamic" else None,
                version=getattr(arguments, "version", None),
                config=arguments.config,
                norm_head=arguments.norm_head,
                chat=arguments.chat,
                force=arguments.force,
                verify=arguments.verify,
            )
            convert(FAMILIES[family], request, tokenizer, Reporter())

    return _status(action, ADVICE | ADVICE_TO_CONVERT)


def run_revert(family: str, arguments: argparse.Namespace) -> int:
    """Reverts as the user asked; the exit status."""

    def action() -> None:
        from .mapping.families import FAMILIES
        from .running.reporting import Reporter
        from .running.revert import RevertRequest, revert

        request = RevertRequest(
            source=arguments.src,
            target=arguments.tgt,
            tp_size=arguments.tp_size,
            pp_size=arguments.pp_size,
            num_chunks=arguments.num_chunks,
            wp_size=arguments.wp_size,
            isp=arguments.isp,
            mlp_layer_fusion=arguments.mlp_layer_fusion,
            version=getattr(arguments, "version", 2),
            embed_split=arguments.embed_split,
            use_flash=arguments.use_flash,
            safetensors=arguments.safetensors,
            force=arguments.force,
            verify=arguments.verify,
        )
        revert(FAMILIES[family], request, Reporter())

    return _status(action)


def _status(action: Callable[[], None], advice: Mapping[int, str] = ADVICE) -> int:
    """The exit status of `action`: 0, or 1 after a sentence on the error stream; 128 + a signal that ended it."""
    status, sentence = 0, None
    try:
        with raised_once():
            _check_address_space()
            action()
    except (ConversionError, OSError, MemoryError, ImportError) as error:
        status, sentence = 1, f"error: {_failure(error, advice)}"
    except EndedBySignal as end:
        word = "interrupted" if end.number == signal.SIGINT else f"ended by {end.number.name}"
        status, sentence = end.status, f"{word}: --tgt is as it was before, or complete"
    if sentence is not None:
        say(sentence, to_errors=True)
    if status:
        _end_without_hanging_threads(status)
    return status


def _check_address_space() -> None:
    """Libraries that get too little while they are loaded end the program without an error that could be told."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE_NEEDED:
        raise ConversionError(
            f"the limit on address space is {limit >> 20} MB, {ADDRESS_SPACE_NEEDED >> 20} MB are needed. Raise it "
            "(ulimit -v)."
        )


def _failure(error: Exception, advice: Mapping[int, str]) -> str:
    """What stopped a run, and what to do about it."""
    if isinstance(error, ConversionError):
        return str(error)
    if isinstance(error, OSError):
        paths = [str(path) for path in (error.filename, error.filename2) if path]
        what = f"{' -> '.join(paths)}: {error.strerror or error}" if paths else error.strerror or str(error)
        remedy = advice.get(error.errno or 0)
    elif isinstance(error, ModuleNotFoundError):
        what, remedy = str(error), "install what this folder needs: pip install ."
    else:  # so an import may end, too: of a library that gets too little memory
        what, remedy = str(error) or "memory ran out", ADVICE[errno.ENOMEM]
    return f"{what}. {NOTHING_WRITTEN}; {remedy}" if remedy else f"{what}. {NOTHING_WRITTEN}."


def _end_without_hanging_threads(status: int) -> None:
    """Ends the program at once where a thread hangs in a read that never returns: Python would wait for it."""
    copying = sys.modules.get(f"{__package__}.files.copying")
    if copying is not None and copying.copying_threads():
        os._exit(status)
