"""Every family is asked to write every other family's models, and models with a field changed: it refuses, or what it
wrote reads back.

A writer is asked about models made of parts that it may not know. Whatever it meets, the answer is a ConfigError or
an equal reading.
"""

import functools
import json
import random

import pytest

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import ModelConfig
from nanollm.errors import ConfigError
from tests.fixtures import FIXTURES, MAIN
from tests.oracles import hf_config
from tests.test_mutants import mutations

CHANGED = 4  # models with one field changed, of each fixture and family


@functools.cache
def models() -> dict[str, ModelConfig]:
    """The configs of the main fixtures, and of one of each family, as their hub folders say them."""
    found, seen = {}, set()
    for name, fixture in FIXTURES.items():
        values = json.loads(hf_config(fixture).to_json_string()) | {"dtype": "float32"}
        if fixture.edit is not None:
            fixture.edit(values)
        family, config = read_config(values)
        if name in MAIN or family.name not in seen:
            found[name] = config
        seen.add(family.name)
    return found


@functools.cache
def changed(name: str) -> list[ModelConfig]:
    """The same with one field changed, in every way that gives a config."""
    return [config for _, config in mutations(models()[name]) if config is not None]


@pytest.mark.parametrize("family", dict.fromkeys(FAMILIES.values()), ids=lambda family: family.name)
def test_a_writer_refuses_or_is_right(family):
    draw, written = random.Random(family.name), 0
    for name, config in models().items():
        for each in [config, *draw.sample(changed(name), CHANGED)]:
            try:
                values = write_config(each, family)[1]
            except ConfigError:
                continue
            assert read_config(values)[1] == each, name
            written += 1
    assert written > 0, "not even its own"
