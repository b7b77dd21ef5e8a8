"""The families that can be converted, by the name their scripts use."""

from .internlm import INTERNLM
from .internlm2 import INTERNLM2

FAMILIES = {"internlm": INTERNLM, "internlm2": INTERNLM2}
