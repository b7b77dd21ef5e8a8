"""compatibility.py's table in docs/versions.md and, in Chinese, in docs/versions-zh-Hans.md."""

from __future__ import annotations

BEGIN, END = "<!-- made by make compat -->", "<!-- up to here -->"

WORDS = {
    "on a folder as published": "在与已发布的相同的文件夹上",
    "AutoTokenizer: the ids of SentencePiece, exact round trip": "AutoTokenizer：id 与 SentencePiece 相同，往返精确",
    "golden forward passes": "前向计算与基准值相同",
    "golden decoding, token by token": "逐个 token 解码与基准值相同",
    "golden greedy generation, cached and uncached": "贪心生成与基准值相同，有缓存和无缓存",
    "every kind of cache, one prompt and a padded batch = no cache": "每种缓存，单个提示和带填充的批 = 无缓存",
    "beam search, cached = uncached": "束搜索，有缓存 = 无缓存",
    "left-padded generation = each row alone": "左填充的生成 = 每行单独生成",
    "the same with a static cache": "同上，使用静态缓存",
    "packed sequences = each alone": "拼接的序列 = 每个单独计算",
    "token classification, question answering": "token 分类，问答",
    "loss and backward": "损失与反向传播",
    "gradient checkpointing: the same gradients": "梯度检查点：梯度相同",
    "save_pretrained and reload: the same bits": "save_pretrained 后重新加载：逐位相同",
    "device_map with cpu and disk": "device_map，使用 CPU 和磁盘",
    "yes": "是",
    "The paged cache of transformers before 5.4 takes all the memory that there is, and its settings cannot say "
    "otherwise, so it was not tried. Use generate there.": "transformers 5.4 之前的分页缓存会占用全部内存，"
    "设置中也无法限制，因此没有尝试。请在这些版本上使用 generate。",
}


def with_table(page: str, table: str) -> str:
    """The page with `table` between the two marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"a page lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def table_of(page: str) -> str:
    """The table of a page."""
    return page.partition(BEGIN)[2].partition(END)[0].strip()


def table_in_chinese(table: str) -> str:
    """The table and its notes; names of classes, functions and arguments stay."""
    return "\n".join(_line(line) for line in table.splitlines())


def _line(line: str) -> str:
    if line.startswith("| "):
        cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
        return f"| {' | '.join(WORDS.get(cell, cell).replace(' no [', ' 否 [') for cell in cells)} |"
    mark, space, note = line.partition("] ")
    return mark + space + WORDS.get(note, note)
