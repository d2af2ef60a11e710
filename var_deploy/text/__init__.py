"""Text for text-to-image models: prompts become tokens, and files describe text encoders."""
