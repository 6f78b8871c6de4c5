"""python -m nanollm.data: text into shards. The command is `main` of prepare.py."""

from nanollm.data.prepare import main

if __name__ == "__main__":
    main()
