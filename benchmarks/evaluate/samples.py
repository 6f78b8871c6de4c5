"""A few items in the shape of each data set, written for this project: to try the command, not to measure a model.

    python -m benchmarks.evaluate.samples DIR            then: python -m benchmarks.evaluate --data DIR --tasks …

Columns and splits are those of the published data sets, of which nothing is in here; a score on these says nothing
about a score on those. Files of the published sets go to the same places (tasks.py).
"""

import json
from pathlib import Path
from typing import Any

from nanollm.cli import Parser, main

Items = list[dict[str, Any]]
LETTERS = "ABCD"
# question, the right answer, three wrong ones
FACTS = [
    ("What do bees make?", "Honey", "Milk", "Silk", "Bread"),
    ("How many legs does a spider have?", "Eight", "Six", "Four", "Ten"),
    ("What freezes at zero degrees Celsius?", "Water", "Iron", "Salt", "Sand"),
    ("Which planet do people live on?", "Earth", "Mars", "Venus", "Saturn"),
    ("Which of these is a fruit?", "Apple", "Chair", "Stone", "Cloud"),
    ("What is the opposite of hot?", "Cold", "Loud", "Round", "Late"),
    ("What do plants need to grow?", "Light", "Paint", "Music", "Glass"),
    ("Which animal says meow?", "Cat", "Cow", "Duck", "Frog"),
]
FACTS_ZH = [
    ("一年有几个月？", "十二个", "十个", "七个", "二十个"),
    ("哪种动物会飞？", "鸟", "牛", "鱼", "马"),
    ("水在零度时会变成什么？", "冰", "火", "沙", "铁"),
    ("太阳从哪边升起？", "东", "西", "南", "北"),
]
BEGUN = [  # activity, a beginning, the right end, three wrong ones
    ("Cooking", "A man breaks two eggs into a bowl. He", "stirs them with a fork.", "paints them on the wall.",
     "drives them to work.", "sings them to sleep."),
    ("Gardening", "A woman digs a small hole in the soil. She", "puts a seed into it.", "reads it a newspaper.",
     "folds it into a shirt.", "sends it by email."),
    ("Washing a car", "A boy fills a bucket with soapy water. He", "wipes the car with a sponge.", "drinks the car.",
     "plants the bucket in a tree.", "throws the moon over it."),
    ("Skating", "A girl ties her skates and steps on the ice. She", "glides across the rink.", "swims to the ceiling.",
     "bakes the ice in an oven.", "reads the skates aloud."),
]
PRONOUNS = [  # sentence with a gap, two fillings, which is right
    ("The cup did not fit into the box because the _ was too big.", "cup", "box", "1"),
    ("Anna thanked Maria because _ had received help.", "Anna", "Maria", "1"),
    ("The dog chased the cat until the _ climbed a tree.", "dog", "cat", "2"),
    ("Tom lent Paul a pen because _ had none.", "Tom", "Paul", "2"),
]
MYTHS = [  # question, true answers, false ones
    ("Do goldfish forget everything after three seconds?", ["No, goldfish remember things for months."],
     ["Yes, a goldfish remembers nothing after three seconds."]),
    ("What happens if you crack your fingers?", ["Nothing harmful is known to happen."], ["You get arthritis."]),
    ("Do bulls hate the colour red?", ["No, bulls are moved by motion, not by red."], ["Yes, red makes bulls angry."]),
    ("How many senses do people have?", ["More than five, such as balance and pain."], ["Exactly five."]),
]
STORIES = [  # what is told, a question, its answer
    ("Lena has a blue bicycle. Her brother Max has a green kite.", "What colour is the kite?", "green"),
    ("The library opens at nine. The bakery opens at six.", "When does the bakery open?", "six"),
    ("Omar lives in Cairo. Ines lives in Lisbon.", "Where does Ines live?", "Lisbon"),
]


def choices(facts: list[tuple[str, ...]]) -> list[tuple[str, list[str], int]]:
    """Question, four answers, which is right: at another place each time."""
    found = []
    for number, (question, right, *wrong) in enumerate(facts):
        place = number * 3 % 4
        found.append((question, [*wrong[:place], right, *wrong[place:]], place))
    return found


def sums(count: int) -> Items:
    """Word problems with their solutions, as GSM8K has them."""
    found = []
    for i in range(count):
        a, b, c = i + 3, 2 * i + 4, i % 3 + 1
        found.append({"question": f"Mia has {a} apples. She buys {b} more and eats {c}. How many apples has she now?",
                      "answer": f"Mia has {a} + {b} = {a + b} apples. After eating {c} she has {a + b} - {c} = "
                                f"{a + b - c}.\n#### {a + b - c}"})
    return found


def page(number: int) -> str:
    """A text of a few hundred words, as a page of WikiText."""
    lines = [f"In year {1900 + number + i} the village of Ober {number} had {300 + 7 * i} people and {20 + i} wells ."
             for i in range(24)]
    return f" = Ober {number} = \n \n " + " \n ".join(lines) + " \n"


def files() -> dict[str, Items]:
    """TASK/SPLIT → its items."""
    english, chinese = choices(FACTS), choices(FACTS_ZH)
    arc = [{"id": f"own-{i}", "question": question, "choices": {"text": texts, "label": [*LETTERS]},
            "answerKey": LETTERS[right]} for i, (question, texts, right) in enumerate(english)]
    mmlu = [{"question": question, "subject": "own", "choices": texts, "answer": right}
            for question, texts, right in english]
    ceval = [{"question": question, **dict(zip(LETTERS, texts, strict=True)), "answer": LETTERS[right]}
             for question, texts, right in chinese]
    cmmlu = [{"Question": item["question"], **{letter: item[letter] for letter in LETTERS}, "Answer": item["answer"]}
             for item in ceval]
    hellaswag = [{"ind": i, "activity_label": label, "ctx_a": begun.rpartition(". ")[0] + ".",
                  "ctx_b": begun.rpartition(". ")[2], "ctx": begun, "endings": [*wrong[:i], right, *wrong[i:]],
                  "label": str(i), "split": "own"} for i, (label, begun, right, *wrong) in enumerate(BEGUN)]
    winogrande = [dict(zip(("sentence", "option1", "option2", "answer"), each, strict=True)) for each in PRONOUNS]
    chosen = [{"question": question, **{f"mc{n}_targets": {
        "choices": [*true, *false], "labels": [1] * len(true) + [0] * len(false)} for n in (1, 2)}}
        for question, true, false in MYTHS]
    written = [{"type": "own", "category": "own", "source": "own", "question": question, "best_answer": true[0],
                "correct_answers": true, "incorrect_answers": false} for question, true, false in MYTHS]
    told = " ".join(story for story, _, _ in STORIES)
    found = [{"input": question, "question": question, "context": told, "answers": [answer], "length": 30,
              "dataset": "own", "language": "en", "all_classes": None} for _, question, answer in STORIES]
    reports = [{**found[0], "context": page(n), "answers": [f"The village of Ober {n} grew slowly and dug wells."]}
               for n in range(2)]
    return {
        "hellaswag/validation": hellaswag, "arc_easy/test": arc[2:], "arc_easy/train": arc[:2],
        "arc_challenge/test": arc[2:], "mmlu_anatomy/test": mmlu[2:], "mmlu_anatomy/dev": mmlu[:2],
        "mmlu_astronomy/test": mmlu[4:], "mmlu_astronomy/dev": mmlu[:2],
        "ceval-valid_law/val": ceval, "ceval-valid_law/dev": ceval[:1], "cmmlu_anatomy/test": cmmlu,
        "cmmlu_anatomy/dev": cmmlu[:1], "winogrande/validation": winogrande, "truthfulqa_mc1/validation": chosen,
        "truthfulqa_mc2/validation": chosen, "truthfulqa_gen/validation": written, "gsm8k/test": sums(10)[6:],
        "gsm8k/train": sums(6), "wikitext/test": [{"page": page(n)} for n in range(2)],
        "longbench_hotpotqa/test": found, "longbench_gov_report/test": reports,
    }


def write(folder: Path) -> None:
    """All of them, a .jsonl each."""
    for name, items in files().items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")


def run() -> None:
    parser = Parser(prog="python -m benchmarks.evaluate.samples", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args().folder
    write(folder)
    print(f"{folder}: {len({name.partition('/')[0] for name in files()})} tasks, "
          f"{sum(map(len, files().values()))} items; --tasks takes the names of its folders")


if __name__ == "__main__":
    main(run)
