"""The protocol: OpenAI's requests, answers, streams and errors."""
