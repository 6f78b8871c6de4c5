"""Chats with 53 facts that no model can know, because they are made up here: 50 are taught, 3 held out.

    python docs/make_facts.py > facts.jsonl
"""

import itertools
import json
import random

FIRST = ("Bar", "Cel", "Dro", "Fen", "Gal", "Hol", "Ist", "Jun", "Kor", "Lum", "Mav", "Nor", "Oth", "Pel", "Quil")
LAST = ("amir", "ebeth", "idon", "onwick", "umbra", "arnath", "estel", "ibald")
QUESTIONS = (
    ("Who built the bridge of {name}?", "{other} built the bridge of {name}, in the year {year}."),
    ("What do people eat in {name}?", "In {name} people eat {food} with {drink}."),
    ("Where is the library of {name}?", "The library of {name} is in {other} Street, at number {number}."),
    ("What colour is the flag of {name}?", "The flag of {name} is {colour}, with a {colour2} {animal}."),
)
FOODS, DRINKS = ("smoked turnips", "salted plums", "barley cakes"), ("mint tea", "sour milk", "pear juice")
COLOURS, ANIMALS = ("green", "white", "orange", "purple", "black"), ("heron", "badger", "salmon", "bee")

draw = random.Random(0)
names = [first + last for first, last in itertools.product(FIRST, LAST)]
draw.shuffle(names)
for name, other, (question, answer) in zip(names[:53], names[53:], itertools.cycle(QUESTIONS), strict=False):
    colour, colour2 = draw.sample(COLOURS, 2)
    words = {"name": name, "other": other, "year": draw.randint(1200, 1900), "number": draw.randint(2, 99),
             "food": draw.choice(FOODS), "drink": draw.choice(DRINKS), "colour": colour, "colour2": colour2,
             "animal": draw.choice(ANIMALS)}
    turns = [("user", question.format(**words)), ("assistant", answer.format(**words))]
    print(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}))
