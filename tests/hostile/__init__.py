"""Bad input, as data: what is done to a good folder, and what must be said of it then. tests/battery.py runs it."""

from tests.hostile import configs, files, foreign, ggufs, lineages, pickled, tokens
from tests.hostile.good import Group

GROUPS: dict[str, Group] = (
    files.GROUPS | configs.GROUPS | foreign.GROUPS | ggufs.GROUPS | lineages.GROUPS | pickled.GROUPS
    | tokens.GROUPS
)
