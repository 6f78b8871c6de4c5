"""Text ↔ token ids: tokenizers, the files they come in, chats and their templates. Knows no decoder."""
