"""All that a session on one GPU has to find out, as one command: see __main__.py."""
