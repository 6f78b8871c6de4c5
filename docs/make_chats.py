"""Questions about Python's standard library, and the first line of each module's docstring as the answer: a chat a line, to fine-tune on.

    python docs/make_chats.py > chats.jsonl
"""

import ast
import json

from nanollm.data.documents import standard_library

for document in standard_library():
    name = document.name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    answer = (ast.get_docstring(ast.parse(document.text)) or "").partition("\n")[0].strip()
    if 10 <= len(answer) <= 80 and "_" not in name:
        print(json.dumps({"messages": [{"role": "user", "content": f"What is {name} for?"}, {"role": "assistant", "content": answer}]}))
