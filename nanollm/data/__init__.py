"""Text ↔ rows of tokens for training: documents, shards, chats, and the stream that a run reads."""
