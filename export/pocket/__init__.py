"""pocket, the small model that ships with var-deploy."""
