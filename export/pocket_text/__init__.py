"""pocket-text, the small text-to-image model that ships with var-deploy."""
