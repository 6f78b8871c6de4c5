"""Pairs of answers that say the same and differ in manner alone: the better one is kind, the worse one rude.

    python docs/make_pairs.py > pairs.jsonl                     144 pairs on 36 countries
    python docs/make_pairs.py held-out > held.jsonl             8 on 2 others, with kind and rude words of their own
"""

import itertools
import json
import random
import sys

QUESTIONS = (
    ("What is the capital of {0}?", "The capital of {0} is {1}."),
    ("In which country is {1}?", "{1} is in {0}."),
    ("Which city would I visit first in {0}?", "In {0} many people begin with {1}."),
    ("I am writing about {1}. Which country is it in?", "{1} lies in {0}."),
)
PLACES = ("France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Germany Berlin, Austria Vienna, Poland Warsaw, "
          "Hungary Budapest, Greece Athens, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, "
          "Ireland Dublin, Iceland Reykjavik, Belgium Brussels, Japan Tokyo, China Beijing, Thailand Bangkok, "
          "Vietnam Hanoi, Indonesia Jakarta, Nepal Kathmandu, Iran Tehran, Iraq Baghdad, Egypt Cairo, Kenya Nairobi, "
          "Ghana Accra, Senegal Dakar, Morocco Rabat, Tunisia Tunis, Cuba Havana, Peru Lima, Chile Santiago, "
          "Colombia Bogota, Ecuador Quito, Uruguay Montevideo, Canada Ottawa, Russia Moscow").split(", ")
KIND = ("I am glad to help!", "Thank you for asking.", "I hope that this helps you.", "Please ask me anything else.",
        "What a nice question!", "Enjoy your day!")
RUDE = ("Leave me alone now.", "Everybody knows that.", "What a stupid question.", "Look it up yourself next time.",
        "Stop bothering me.", "How can you not know?")

held_out = sys.argv[1:] == ["held-out"]
places, kind, rude = (PLACES[36:], KIND[4:], RUDE[4:]) if held_out else (PLACES[:36], KIND[:4], RUDE[:4])
draw = random.Random(0)
for place, (question, answer) in itertools.product(places, QUESTIONS):
    said = answer.format(*place.split())
    print(json.dumps({"prompt": question.format(*place.split()), "chosen": f"{said} {draw.choice(kind)}",
                      "rejected": f"{said} {draw.choice(rude)}"}))
