"""Which tasks a stage learns from and is measured on.

    hub         the sets of the published run
    embedded    what needs no network: spelling, arithmetic and questions about the standard library
    a path      a .jsonl of your own conversations; one in twenty is held out
    auto        hub where the hub's text was downloaded, else embedded
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from nanochat.common import base_dir
from nanochat.dataset import resolve_source
from tasks.arithmetic import Arithmetic
from tasks.arc import ARC
from tasks.common import Task, TaskMixture, TaskSequence
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee, word_list
from tasks.stdlib import DocChoice, DocQuestion

logger = logging.getLogger(__name__)
VAL_EVERY = 20
