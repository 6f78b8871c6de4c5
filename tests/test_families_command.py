"""python -m checkpoints.families: the list, and the tables of one family in words."""

import subprocess
import sys

from checkpoints.families import FAMILIES
from checkpoints.families.__main__ import described, listed
from tests.test_house import ROOT


def test_the_list_has_every_model_type():
    text = "\n".join(listed())
    assert all(kind in text for kind in FAMILIES)


def test_a_family_in_words():
    lines = described("qwen3", FAMILIES["qwen3"])
    keys = {line.split()[0]: line for line in lines if line.startswith("    ")}
    assert keys["num_key_value_heads"].endswith("mixer.kv_heads; missing: 32")
    assert keys["vocab_size"].endswith("must stand") and keys["lm_head"].split()[1] == "head"
    assert all(described(kind, family) for kind, family in FAMILIES.items())


def test_an_unknown_name_is_answered_with_the_nearest():
    found = subprocess.run(
        [sys.executable, "-m", "checkpoints.families", "qwen4"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 1 and found.stderr.startswith("error: no model_type 'qwen4'; near it are qwen")
