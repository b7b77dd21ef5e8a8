"""What a conversion needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConversionError
from .specs import TokenizerSpec


@dataclass(frozen=True)
class TokenizerFacts:
    """What decides whether a conversion starts: the number of pieces, and why the tokenizer does not do, if so."""

    vocab_size: int
    refusal: str | None


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files of a Hugging Face folder by name, and what is to be said of them."""

    contents: Mapping[str, bytes]
    warnings: tuple[str, ...]

    def write(self, folder: Path) -> tuple[str, ...]:
        """Write the files into `folder`; return the warnings."""
        for name, content in self.contents.items():
            (folder / name).write_bytes(content)
        return self.warnings


def prepare_tokenizer(
    path: Path, spec: TokenizerSpec, chat: bool, tell: Callable[[TokenizerFacts], object]
) -> TokenizerFiles:
    """Tell the facts of a tokenizer as soon as they are known; return its files.

    Its libraries are imported here: a run that has this done by another process does not load them.

    Raises:
        ConversionError: no tokenizer of either family can be read there.
    """
    from .tokenizer_files import Tokenizer

    tokenizer = Tokenizer.read(path)
    try:
        if chat:
            tokenizer.check_chat(spec)
        if spec.module is None:
            tokenizer.check_without_code(spec, chat)
    except ConversionError as error:
        tell(TokenizerFacts(tokenizer.vocab_size, str(error)))
        return TokenizerFiles({}, ())
    tell(TokenizerFacts(tokenizer.vocab_size, None))
    return tokenizer.files(spec, chat)
