"""python -m nanollm.data: text into shards. The command is `main` of prepare.py."""

from nanollm.cli import quiet_ctrl_c

if __name__ == "__main__":
    quiet_ctrl_c()              # before torch
    from nanollm.data.prepare import main

    main()
