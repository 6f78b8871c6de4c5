"""Chats to fine-tune on, one a line: what is this module of the standard library for? The first line of its docstring.

    python docs/make_chats.py > chats.jsonl
"""

import ast
import json

from nanollm.data.documents import standard_library

for document in standard_library():
    name = document.name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    answer = (ast.get_docstring(ast.parse(document.path.read_bytes())) or "").partition("\n")[0].strip()
    if 10 <= len(answer) <= 80 and "_" not in name:
        turns = [("user", f"What is {name} for?"), ("assistant", answer)]
        print(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}))
